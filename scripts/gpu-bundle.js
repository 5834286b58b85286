// `npm run gpu:bundle -- <folder> [--node]`: gathers what scripts/gpu.js needs on a machine that has a GPU, but neither
// this clone nor its packages nor a network: compiled library and tests, addon and CUDA library, the packages that they
// load, fixtures, and the conformance programs, as sources and, where there is nvcc, built. `--node` adds this Node,
// compressed, for machines without one: run.sh unpacks it. There, `sh run.sh` does what `npm run gpu` does here.
import { execFileSync, spawnSync } from 'node:child_process'
import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { CONFORMANCE_CODE } from './gpu-parts.js'
import { root } from './setup.js'

const MOST_BYTES = 64 << 20
const RELEASE = join('build', 'Release')
const BACKENDS = ['libropewalk_cuda.so', 'libropewalk_simt.so']

/** The packages that a package needs to run, itself included. */
function withDependencies(name, found = new Set()) {
  if (found.has(name)) return found
  found.add(name)
  const { dependencies = {} } = JSON.parse(readFileSync(join(root, 'node_modules', name, 'package.json'), 'utf8'))
  for (const other of Object.keys(dependencies)) withDependencies(other, found)
  return found
}

function commit() {
  const git = (...args) =>
    execFileSync('git', args, { cwd: root, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
  try {
    return git('rev-parse', '--short=12', 'HEAD').trim() + (git('status', '--porcelain', '-uno') === '' ? '' : '+')
  } catch {
    return 'unknown: not a git checkout'
  }
}

function bytesOf(path) {
  if (!statSync(path).isDirectory()) return statSync(path).size
  return readdirSync(path).reduce((sum, name) => sum + bytesOf(join(path, name)), 0)
}

/** Writes the bundle to a folder, which is replaced; gives its bytes, Node not counted. */
export function makeBundle(to, { node = false } = {}) {
  const addon = join(RELEASE, 'ropewalk.node')
  if (!existsSync(join(root, addon))) throw new Error(`${addon} is missing: npm run build:native`)
  if (existsSync(to) && readdirSync(to).length > 0 && !existsSync(join(to, 'bundle.json'))) {
    throw new Error(`${to} is no bundle, and not empty: name another folder`)
  }
  rmSync(to, { recursive: true, force: true })
  mkdirSync(to, { recursive: true })
  const copy = (path, into = path) => {
    mkdirSync(dirname(join(to, into)), { recursive: true })
    cpSync(join(root, path), join(to, into), { recursive: true })
  }
  // Types are checked by npm test.
  const tsc = ['node_modules/typescript/bin/tsc', '-p', 'test/tsconfig.json', '--noEmit', 'false', '--noCheck']
  const { status } = spawnSync(process.execPath, [...tsc, '--outDir', to], { cwd: root, stdio: 'inherit' })
  if (status !== 0) throw new Error('the library and its tests could not be compiled')
  copy(addon)
  for (const name of BACKENDS) if (existsSync(join(root, RELEASE, name))) copy(join(RELEASE, name))
  for (const path of ['package.json', 'LICENSE', 'lib/bench/peers.py', 'test/fixtures', 'csrc']) copy(path)
  copy('test/simt')
  buildConformance(to)
  for (const name of readdirSync(join(root, 'scripts')).filter((name) => /^gpu/.test(name))) copy(join('scripts', name))
  const { dependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
  const packages = Object.keys(dependencies).filter((name) => !/^node-(addon-api|api-headers)$/.test(name))
  for (const name of new Set(packages.flatMap((name) => [...withDependencies(name)]))) {
    cpSync(join(root, 'node_modules', name), join(to, 'node_modules', name), { recursive: true, dereference: true })
  }
  copy('scripts/gpu-tap.js', 'node_modules/tap/index.js')
  writeFileSync(join(to, 'node_modules/tap/package.json'), '{ "type": "module", "exports": "./index.js" }\n')
  const bundle = { commit: commit(), date: new Date().toISOString() }
  writeFileSync(join(to, 'bundle.json'), `${JSON.stringify(bundle, null, 1)}\n`)
  writeFileSync(join(to, 'run.sh'), RUN)
  chmodSync(join(to, 'run.sh'), 0o755)
  if (node) addNode(to)
  const bytes = bytesOf(to)
  if (bytes > MOST_BYTES) throw new Error(`${to} has ${bytes} bytes, but may have ${MOST_BYTES} to be carried`)
  return bytes
}

/** The programs of test/simt/conformance*.cu, for every GPU; left out where there is no nvcc. */
function buildConformance(to) {
  const nvcc = process.env.CUDACXX || 'nvcc'
  if (spawnSync(nvcc, ['--version']).error) return
  const folder = join(to, 'conformance')
  mkdirSync(folder)
  const options = ['-std=c++17', '-O2', '-Icsrc', '-Xcompiler', '-static-libstdc++', '-Xcompiler', '-static-libgcc']
  for (const name of readdirSync(join(root, 'test/simt')).filter((name) => /^conformance.*\.cu$/.test(name))) {
    const output = join(folder, name.replace(/\.cu$/, ''))
    const args = [...options, ...CONFORMANCE_CODE, join('test/simt', name)]
    const { status } = spawnSync(nvcc, [...args, '-o', output], { cwd: root, stdio: 'inherit' })
    if (status !== 0) throw new Error(`test/simt/${name} could not be compiled by ${nvcc}`)
  }
}

const RUN = `#!/bin/sh
# Runs scripts/gpu.js with the Node on PATH, else with the one in node.xz.
here=$(dirname "$0")
node=node
if ! command -v node >/dev/null 2>&1; then
  node="$here/node"
  unpack='import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)'
  [ -x "$node" ] || { { xz -dc "$node.xz" || python3 -c "$unpack" "$node.xz"; } >"$node" && chmod +x "$node"; } || exit 1
fi
exec "$node" "$here/scripts/gpu.js" "$@"
`

function addNode(to) {
  cpSync(process.execPath, join(to, 'node'), { dereference: true })
  execFileSync('xz', ['-T0', '-6', join(to, 'node')], { stdio: 'inherit' })
}

if (process.argv[1] && resolve(process.argv[1]) === fileURLToPath(import.meta.url)) {
  const args = process.argv.slice(2)
  const [folder, ...more] = args.filter((arg) => !arg.startsWith('--'))
  const unknown = args.filter((arg) => arg.startsWith('--') && arg !== '--node')
  if (!folder || more.length > 0 || unknown.length > 0) {
    console.error('usage: npm run gpu:bundle -- <folder> [--node]')
    process.exit(2)
  }
  try {
    const bytes = makeBundle(resolve(folder), { node: args.includes('--node') })
    console.log(`${folder}: ${(bytes / 1e6).toFixed(1)} MB; there: sh run.sh --out <folder>`)
    if (!existsSync(join(resolve(folder), RELEASE, BACKENDS[0]))) {
      console.log(`without ${BACKENDS[0]}, which has not been built here: npm run build:cuda`)
    }
  } catch (error) {
    console.error(`gpu:bundle: ${error.message}`)
    process.exit(1)
  }
}
