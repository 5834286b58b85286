// Packs the package as it would be published, installs it in an empty folder where there is no compiler, CMake or Python,
// and uses it there; then breaks it and reads the messages. The prebuilt addon is the clone's, so that it is not compiled
// twice; the CUDA library too where it is newer than its sources, else it is built in .cmake-cuda. Without nvcc the tests
// of it are skipped. Ends with "package: N passed, N failed, N skipped".
import { spawnSync } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { buildCudaLibrary, nvccVersion } from './cuda-library.js'
import { newest, root, setup } from './setup.js'

/** Bytes that the packed tarball may have, whatever comes: onnxruntime-node was refused by npm at 400 MB. */
const LIMIT = 50_000_000
/**
 * What it may have today, without and with the CUDA library: to be raised by those who see why it grows. The products over
 * quantised weights are the last that did.
 */
const BUDGET = { cpu: 3_500_000, cuda: 8_000_000 }
const FIXTURE = join(root, 'test', 'fixtures', 'mha-f32')
const PREBUILT = join('prebuilds', 'linux-x64', 'ropewalk.glibc.node')
const BUILT = join('build', 'Release', 'ropewalk.node')
const CUDA_LIBRARY = 'libropewalk_cuda.so'
const PREBUILT_CUDA = join('prebuilds', 'linux-x64', CUDA_LIBRARY)
const CUDA_SOURCES = ['csrc/cuda', 'csrc/backend.h', 'csrc/ops.h', 'csrc/ops.def', 'csrc/glibc.cc', 'CMakeLists.txt']
const DOCTOR = ['--no', 'ropewalk', 'doctor', '--json']

/** What users get. */
const CONTENT = [
  /^lib\/(bench\/peers\.py|demo\/checkpoint\/[\w.]+\.(json|safetensors))$/,
  /^(package\.json|README\.md|LICENSE|CHANGELOG\.md)$/,
  /^dist\/[\w/-]+(\.gen)?(\.js|\.d\.ts)$/,
  /^prebuilds\/(SHA256SUMS|linux-x64\/(ropewalk\.glibc\.node|libropewalk_cuda\.so))$/,
  /^(CMakeLists\.txt|scripts\/cmake\.js|csrc\/(?!simt\/)[\w/]+\.(cc|cu|h|def|map))$/,
]

setup()
const total = { passed: 0, failed: 0, skipped: 0 }
const work = fs.mkdtempSync(join(tmpdir(), 'ropewalk-package-'))
process.on('exit', () => fs.rmSync(work, { recursive: true, force: true }))
/** Without what an outer npm says about its own package. */
const full = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !/^(npm_(package|lifecycle|config_local)|INIT_CWD$)/.test(name)),
)
const bare = { ...full, PATH: bareTools() }
const app = emptyFolder('app')
const installed = join(app, 'node_modules', 'ropewalk')
const node = (args, env = bare, cwd = app) => run(process.execPath, args, { cwd, env })
const child = (mode, env, cwd) => node(['child.mjs', mode, FIXTURE], env, cwd)
let tarball
let loss

class Skip extends Error {}

const cuda = cudaLibrary()
const tree = copyTree()

test('npm pack refuses a package without the CUDA library', () => {
  const { status, stderr } = spawnSync('npm', ['pack', '--dry-run'], { cwd: tree, env: full, encoding: 'utf8' })
  equal(status, 1, 'exit code')
  contains(stderr, `${PREBUILT_CUDA} is missing: npm run build:prebuilds`)
})

test('npm pack gives what it should, and the same twice', () => {
  if (cuda.path) run('strip', ['-o', join(tree, PREBUILT_CUDA), cuda.path])
  const env = cuda.path ? full : { ...full, ROPEWALK_PACK_WITHOUT_CUDA: '1' }
  const pack = () => JSON.parse(run('npm', ['pack', '--json', '--pack-destination', work], { cwd: tree, env }))[0]
  const [first, second] = [pack(), pack()]
  tarball = join(work, first.filename)
  equal(second.integrity, first.integrity, 'the hash of the second tarball')
  const strange = first.files.map(({ path }) => path).filter((path) => !CONTENT.some((pattern) => pattern.test(path)))
  equal(strange.join(' '), '', 'files that do not belong in the package')
  console.error(`   ${first.files.length} files, ${first.size} bytes packed, ${first.unpackedSize} bytes unpacked`)
  equal(first.files.filter(({ path }) => path === PREBUILT_CUDA).length, cuda.path ? 1 : 0, 'CUDA libraries in it')
  const budget = Math.min(LIMIT, cuda.path ? BUDGET.cuda : BUDGET.cpu)
  if (first.size > budget) throw new Error(`the tarball has ${first.size} bytes, its budget is ${budget}`)
})

test('it runs no script at install', () => {
  const { scripts, gypfile } = JSON.parse(fs.readFileSync(join(root, 'package.json'), 'utf8'))
  const hooks = ['preinstall', 'install', 'postinstall', 'prepare'].filter((name) => name in scripts)
  equal(hooks.join(' '), '', 'lifecycle scripts')
  equal(gypfile, false, 'gypfile')
})

test('npm installs it without compiler, CMake and Python', () => {
  install(app, 'npm', ['install', '--ignore-scripts', '--prefer-offline', '--no-audit', '--no-fund'])
})

test('import, require and four workers give the loss of the clone, to the bit', () => {
  loss = child('loss', { ...bare, ROPEWALK_MODULE: pathToFileURL(join(root, 'dist', 'index.js')).href })
  equal(child('loss'), loss, 'import')
  equal(child('workers'), Array(4).fill(loss).join('\n'), 'four workers')
  equal(node(['-e', "console.log(typeof require('ropewalk').Llama.load)"]), 'function', 'require')
})

test('ropewalk doctor finds the prebuilt addon', () => {
  const { ok, checks } = JSON.parse(run('npx', DOCTOR, { cwd: app, env: bare }))
  equal(ok, true, 'ok')
  equal(checks.find(({ name }) => name === 'addon').detail, PREBUILT, 'addon')
})

test('ropewalk bench measures, and writes JSON, CSV and a chart', () => {
  const out = (name) => join(app, name)
  const files = ['--out', out('bench.json'), '--csv', out('bench.csv'), '--svg', out('bench.svg')]
  const options = ['--quick', '--time', '0.05', '--no-peers', '--device', 'cpu', '--threads', '1']
  run('npx', ['--no', 'ropewalk', 'bench', 'matmul,adamw', ...options, ...files], { cwd: app, env: bare })
  const read = (name) => fs.readFileSync(out(name), 'utf8')
  const { cases, failures, machine } = JSON.parse(read('bench.json'))
  equal(failures.length, 0, 'failures')
  equal([...new Set(cases.map(({ stem }) => stem))].join(), 'matmul,adamw', 'stems')
  equal(machine.commit, null, 'commit of an installed package')
  equal(read('bench.csv').trimEnd().split('\n').length, 1 + 2 * cases.length, 'lines of the CSV')
  contains(read('bench.svg'), '<svg', 'matmul nn 128')
})

test('its types resolve in .mts and .cts', () => {
  const types = join(root, 'node_modules', '@types')
  const use = 'export const load: (path: string) => Promise<Llama> = (path) => Llama.load(path, { dtype: "float32" })\n'
  fs.writeFileSync(join(app, 'esm.mts'), `import { Llama } from 'ropewalk'\n${use}`)
  fs.writeFileSync(join(app, 'cjs.cts'), `import { Llama } from 'ropewalk'\n${use}`)
  const options = '--noEmit --strict --module nodenext --target es2022 --lib es2023,esnext.disposable --types node'
  const tsc = join(root, 'node_modules', 'typescript', 'bin', 'tsc')
  node([tsc, ...options.split(' '), '--typeRoots', types, 'esm.mts', 'cjs.cts'])
})

test('20 workers are terminated in mid-step', () => equal(child('terminate'), loss, 'a loss afterwards'))

test('20 processes exit in mid-step', () => {
  for (let i = 0; i < 20; i++) {
    const { status, signal } = spawnSync(process.execPath, ['child.mjs', 'exit', FIXTURE], { cwd: app, env: bare })
    equal(signal ?? status, 7, `how process ${i} ended`)
  }
})

test('a prebuilt addon that is missing, damaged or foreign is refused with the remedy', () => {
  const file = join(installed, PREBUILT)
  const good = fs.readFileSync(file)
  const changed = (change) => {
    const bytes = Buffer.from(good)
    change(bytes)
    return bytes
  }
  const half = good.length >> 1
  const remedy = '; reinstall ropewalk, or build it here: npx ropewalk build'
  for (const [bytes, reason] of [
    [good.subarray(0, half), `is damaged: it has ${half} of ${good.length} bytes`],
    [Buffer.from('garbage'), 'is damaged: it is no ELF file'],
    [changed((bytes) => bytes.writeUInt16LE(183, 18)), 'is for another processor'],
    [changed((bytes) => bytes.writeUInt8(bytes[half] ^ 1, half)), 'is not the one that was shipped: its SHA-256 '],
  ]) {
    fs.writeFileSync(file, bytes)
    refused('ERR_BAD_ADDON', file, reason, remedy)
  }
  fs.rmSync(file)
  const paths = `looked in ${installed} for ${BUILT} and ${PREBUILT}; prebuilt ones here: none`
  refused('ERR_NO_ADDON', 'linux-x64 with glibc', paths, 'npx ropewalk build')
  fs.writeFileSync(file, good)
  const table = join(installed, 'dist', 'runtime', 'ops.gen.js')
  const text = fs.readFileSync(table, 'utf8')
  fs.writeFileSync(table, text.replace(/(?<=TABLE_HASH = ')\w+/, '0'.repeat(16)))
  refused('ERR_STALE_ADDON', file, `expected ${'0'.repeat(16)}`, remedy)
  fs.writeFileSync(table, text)
})

test('no driver, an old one, no GPU: doctor, cuda and auto say which', () => {
  needCuda()
  const driver = emptyFolder('driver')
  const source = join(work, 'driver.c')
  const version = 'int cuDriverGetVersion(int* version) { return *version = atoi(getenv("DRIVER")), 0; }'
  fs.writeFileSync(source, `#include <stdlib.h>\n${version}\nint cuInit(unsigned flags) { return 100 + flags; }\n`)
  run('cc', ['-shared', '-fPIC', '-o', join(driver, 'libcuda.so.1'), source], { cwd: work, env: full })
  // A driver that cannot be loaded is none, also where there is one.
  fs.writeFileSync(join(emptyFolder('no-driver'), 'libcuda.so.1'), '')
  for (const [folder, DRIVER, ...parts] of [
    ['no-driver', '', 'finds no NVIDIA driver (libcuda.so.1). Install driver ', '--gpus all'],
    ['driver', '11040', 'supports CUDA 11.4, this library needs CUDA 1', 'Update the driver', 'npx ropewalk build'],
    ['driver', '99000', 'finds no GPU', 'nvidia-smi should list one'],
  ]) {
    const message = unavailable({ LD_LIBRARY_PATH: join(work, folder), DRIVER })
    contains(message, 'CUDA backend unavailable: ', ...parts)
  }
})

test('a GPU of unsupported capability is refused', () => {
  const library = join(root, '.cmake-simt-fast', 'libropewalk_simt.so')
  if (newest(join('.cmake-simt-fast', 'libropewalk_simt.so')) < newest(...CUDA_SOURCES)) {
    throw new Skip('the emulator, which is the GPU here, is not built')
  }
  const emulated = { ROPEWALK_CUDA_LIBRARY: library, ROPEWALK_SIMT_MACHINE: 'capability=75' }
  contains(unavailable(emulated), 'has compute capability 7.5, the kernels need 8.0 or later')
})

test('a CUDA library that is missing, damaged, changed or of another version is refused with the remedy', () => {
  needCuda()
  const file = join(installed, PREBUILT_CUDA)
  const good = fs.readFileSync(file)
  const half = good.length >> 1
  const changed = Buffer.from(good)
  changed.writeUInt8(changed[half] ^ 1, half)
  for (const [bytes, reason] of [
    [good.subarray(0, half), `is damaged: it has ${half} of ${good.length} bytes; reinstall ropewalk`],
    [changed, 'is not the one that was shipped: its SHA-256 '],
  ]) {
    fs.writeFileSync(file, bytes)
    contains(unavailable(), file, reason, 'npx ropewalk build')
  }
  fs.rmSync(file)
  contains(unavailable(), `there is no ${file}`, 'This installation has no CUDA library', 'npx ropewalk build')
  fs.writeFileSync(file, good)
  const other = join(work, 'other.so')
  const source = `#include "backend.h"\n#include "ops.h"\nstatic rw_backend b = {RW_BACKEND_ABI + 1, rw::table_hash};
    extern "C" const rw_backend* ropewalk_backend() { return &b; }\n`
  fs.writeFileSync(join(work, 'other.cc'), source)
  const options = ['-std=c++17', '-w', '-shared', '-fPIC', `-I${join(installed, 'csrc')}`, '-o', other]
  run('c++', [...options, 'other.cc'], { cwd: work, env: full })
  contains(
    unavailable({ ROPEWALK_CUDA_LIBRARY: other }),
    `${other} speaks ABI`,
    'another version',
    'reinstall ropewalk',
  )
})

test('musl is told apart', () => {
  const musl = join(work, 'musl')
  const start = fs.readFileSync(process.execPath).subarray(0, 2048).toString('latin1')
  fs.writeFileSync(musl, start.replace('ld-linux-x86-64.so.2', 'ld-musl-x86_64.so.1\0'), 'latin1')
  const message = openDevice(`process.execPath = '${musl}'`)
  contains(
    message,
    'ERR_NO_ADDON',
    'linux-x64 with musl',
    `prebuilt ones here: ${PREBUILT.slice(10)}`,
    'ropewalk build',
  )
})

test('ropewalk build names every tool that is missing', () => {
  const { status, stderr } = spawnSync('npx', ['--no', 'ropewalk', 'build'], { cwd: app, env: bare, encoding: 'utf8' })
  equal(status, 1, 'exit code')
  contains(stderr, 'cmake is not on PATH', 'no C++17 compiler', 'neither make nor ninja', 'apt install cmake g++ make')
})

test('ropewalk build builds from the package; the result is used, or refused with the remedy', () => {
  const { addon } = JSON.parse(
    run('npx', ['--no', 'ropewalk', 'build', '--json'], {
      cwd: app,
      env: { ...full, ROPEWALK_CUDA: 'off' }, // nvcc would take minutes
    }),
  )
  equal(addon, BUILT, 'addon')
  if (cuda.path) contains(run('npx', DOCTOR, { cwd: app, env: bare }), BUILT, '"ok":true,"absent":true')
  fs.renameSync(join(installed, 'prebuilds'), join(installed, 'no-prebuilds'))
  equal(child('loss'), loss, 'the loss with it')
  const file = join(installed, BUILT)
  const remedy = '; rebuild it: npx ropewalk build'
  const library = process.report.getReport().sharedObjects.find((path) => path.includes('libgcc_s'))
  fs.copyFileSync(library, file)
  refused('ERR_BAD_ADDON', file, 'is not an addon', remedy)
  const source = join(work, 'foreign.c')
  fs.writeFileSync(source, 'void* napi_register_module_v1(void* env, void* exports) { return exports; }\n')
  run('cc', ['-shared', '-fPIC', '-o', file, source], { cwd: work, env: full })
  refused('ERR_BAD_ADDON', file, "is not ropewalk's", remedy)
})

for (const [tool, verb] of [
  ['npm@12', 'install'],
  ['pnpm@10', 'add'],
]) {
  test(`${tool} installs it`, () => {
    const folder = emptyFolder(tool)
    const fetched = spawnSync('npx', ['--yes', '--prefer-offline', tool, '--version'], { cwd: folder, env: full })
    if (fetched.status !== 0)
      throw new Skip(`npx cannot get ${tool}, or it does not run on Node ${process.versions.node}`)
    const text = install(folder, 'npx', ['--yes', '--prefer-offline', tool, verb])
    if (/ignored build scripts/i.test(text)) throw new Error(`it complains about scripts:\n${text}`)
    equal(child('loss', bare, folder), loss, 'loss')
  })
}

console.log(`package: ${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`)
process.exit(total.failed > 0 ? 1 : 0)

function test(name, body) {
  const started = performance.now()
  const say = (outcome) => console.error(`${outcome} (${((performance.now() - started) / 1000).toFixed(1)} s)`)
  try {
    body()
    total.passed++
    say(`ok: package: ${name}`)
  } catch (error) {
    if (error instanceof Skip) {
      total.skipped++
      say(`skipped: package: ${name}: ${error.message}`)
    } else {
      total.failed++
      say(`not ok: package: ${name}: ${error.stack}`)
    }
  }
}

/** The output of a command that must succeed. */
function run(command, args, options) {
  const { status, signal, stdout, stderr, error } = spawnSync(command, args, { encoding: 'utf8', ...options })
  if (status === 0) return stdout.trim()
  const ended = error?.message ?? signal ?? `code ${status}`
  throw new Error(`${[command, ...args].join(' ')} ended with ${ended}\n${stdout}\n${stderr}`)
}

function equal(actual, expected, what) {
  if (actual !== expected) throw new Error(`${what}: ${JSON.stringify(actual)} instead of ${JSON.stringify(expected)}`)
}

function contains(text, ...parts) {
  for (const part of parts) if (!text.includes(part)) throw new Error(`${JSON.stringify(part)} is not in: ${text}`)
}

/** The installed package's code and message when it opens a device; a crash fails. */
function openDevice(before = '') {
  const open = "import('ropewalk').then(({ Device }) => Device.open())"
  return node([
    '-e',
    `${before};${open}.then(() => console.log('opened'), (error) => console.log(error.code, error.message))`,
  ])
}

function refused(...parts) {
  contains(openDevice(), ...parts)
}

function needCuda() {
  if (cuda.missing) throw new Skip(cuda.missing)
}

/** Why the installed package finds no GPU: the same from doctor, from device cuda, and from auto, which is the CPU. */
function unavailable(variables = {}) {
  const env = { ...bare, ...variables }
  const { ok, checks } = JSON.parse(run('npx', DOCTOR, { cwd: app, env }))
  const { absent, detail } = checks.find(({ name }) => name === 'cuda')
  equal([ok, absent].join(), 'true,true', `whether doctor is content, and without a GPU: ${detail}`)
  const open = `const { Device } = await import('ropewalk'); const auto = Device.open()
    console.log(auto.name, auto.fallback); Device.open('cuda')`
  const { status, stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', open], {
    ...{ cwd: app, env, encoding: 'utf8' },
  })
  equal(status, 1, `exit code with ${stdout} ${stderr}`)
  equal(stdout.trim(), `cpu ${detail}`, 'auto')
  contains(stderr, `device "cuda": ${detail}`, 'ERR_DEVICE_UNAVAILABLE')
  return detail
}

/** The CUDA library: { path }, or { missing } where it cannot be built here. */
function cudaLibrary() {
  const built = join('build', 'Release', CUDA_LIBRARY)
  if (newest(built) > newest(...CUDA_SOURCES)) return { path: join(root, built) }
  if (process.env.ROPEWALK_CUDA === 'off') return { missing: 'ROPEWALK_CUDA is off' }
  if (!nvccVersion()) return { missing: 'there is no nvcc' }
  return { path: buildCudaLibrary(full).library }
}

/** The tree as git would commit it, with the clone's node_modules and its addon as the prebuilt one. */
function copyTree() {
  const tree = join(work, 'tree')
  const listed = run('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], { cwd: root })
  for (const path of listed.split('\0')) {
    if (path && !path.startsWith('test/') && fs.existsSync(join(root, path))) {
      fs.cpSync(join(root, path), join(tree, path))
    }
  }
  fs.symlinkSync(join(root, 'node_modules'), join(tree, 'node_modules'))
  fs.mkdirSync(dirname(join(tree, PREBUILT)), { recursive: true })
  run('strip', ['-o', join(tree, PREBUILT), join(root, BUILT)])
  return tree
}

/** A PATH with Node, npm and what their scripts call, and nothing to build with. */
function bareTools() {
  const folder = join(work, 'bin')
  fs.mkdirSync(folder)
  for (const tool of ['node', 'npm', 'npx', 'sh', 'env', 'uname', 'dirname', 'basename', 'sed', 'readlink']) {
    const found = process.env.PATH.split(delimiter).find((path) => fs.existsSync(join(path, tool)))
    if (!found) throw new Error(`${tool} is not on PATH`)
    fs.symlinkSync(fs.realpathSync(join(found, tool)), join(folder, tool))
  }
  return folder
}

function emptyFolder(name) {
  const folder = join(work, name)
  fs.mkdirSync(folder)
  fs.writeFileSync(join(folder, 'package.json'), '{ "name": "app", "private": true }\n')
  fs.copyFileSync(join(root, 'test', 'package', 'child.mjs'), join(folder, 'child.mjs'))
  return folder
}

/** What the package manager says, on both streams. */
function install(folder, command, args) {
  return run('sh', ['-c', '"$@" 2>&1', 'sh', command, ...args, tarball], { cwd: folder, env: bare })
}
