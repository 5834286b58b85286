import tseslint from 'typescript-eslint'

export default tseslint.config(
  { ignores: ['dist', 'build', '.cmake*', 'test/fixtures', 'lib/runtime/ops.gen.ts'] },
  ...tseslint.configs.recommended,
  {
    files: ['**/*.ts'],
    languageOptions: { parserOptions: { project: 'test/tsconfig.json' } },
    rules: {
      // The two mistakes that types alone do not catch in asynchronous code.
      '@typescript-eslint/no-floating-promises': 'error',
      '@typescript-eslint/await-thenable': 'error',
      // Indices into typed arrays are checked by the loops around them.
      '@typescript-eslint/no-non-null-assertion': 'off',
      '@typescript-eslint/no-unused-vars': ['error', { argsIgnorePattern: '^_', varsIgnorePattern: '^_' }],
    },
  },
  {
    // tap awaits its subtests by itself; golden files are untyped.
    files: ['test/**/*.ts'],
    rules: {
      '@typescript-eslint/no-floating-promises': 'off',
      '@typescript-eslint/no-explicit-any': 'off',
    },
  },
)
