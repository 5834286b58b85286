# Thin on purpose: node-gyp, node-gyp-build and prebuildify all end up in CMakeLists.txt.
{
  "targets": [
    {
      "target_name": "ropewalk",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake",
          "inputs": ["CMakeLists.txt"],
          "outputs": ["<(PRODUCT_DIR)/ropewalk.node"],
          "action": ["node", "scripts/cmake.js"]
        }
      ]
    }
  ]
}
