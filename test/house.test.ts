// Keeps the rules of the house: who may import whom, what each folder may contain, and how large a file may grow.
import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { basename, dirname, extname, join, posix, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { OPS } from '../lib/runtime/ops.gen.js'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const read = (path: string): string => readFileSync(join(root, path), 'utf8')

/** All files below a folder, relative to the root, with forward slashes. */
function filesIn(folder: string, pattern: RegExp): string[] {
  if (!existsSync(join(root, folder))) return []
  return readdirSync(join(root, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile() && pattern.test(entry.name))
    .map((entry) => relative(root, join(entry.parentPath, entry.name)).split('\\').join('/'))
    .sort()
}

const foldersIn = (folder: string): string[] =>
  readdirSync(join(root, folder), { withFileTypes: true })
    .filter((entry) => entry.isDirectory())
    .map(({ name }) => name)

// ---- imports of lib ----

/** The modules that a file names in import, export from and import(). */
function importsOf(path: string): string[] {
  const code = read(path)
    .replace(/\/\*[\s\S]*?\*\//g, '')
    .replace(/^\s*\/\/.*$/gm, '')
  const found = code.matchAll(
    /(?:^|[\s;}])(?:import|export)\b[^'"`;()]*?\bfrom\s*['"]([^'"]+)['"]|\bimport\s*\(?\s*['"]([^'"]+)['"]/g,
  )
  return [...found].map(([, from, plain]) => (from ?? plain)!)
}

// Each may import itself and what stands in its list; `errors` is for all, `rope` for nobody but itself.
const MAY_IMPORT: Record<string, readonly string[]> = {
  errors: [],
  rope: [],
  runtime: ['errors'],
  files: ['errors', 'runtime'],
  theory: ['errors'],
  report: ['errors', 'theory'],
  model: ['errors', 'rope', 'runtime', 'files'],
  train: ['errors', 'rope', 'runtime', 'files', 'model'],
  eval: ['errors', 'rope', 'runtime', 'files', 'model'],
  index: ['errors', 'rope', 'runtime', 'files', 'model', 'train', 'eval', 'theory'],
  bench: ['errors', 'rope', 'runtime', 'files', 'model', 'train', 'index'],
  demo: ['errors', 'rope', 'runtime', 'files', 'model', 'train', 'eval', 'index', 'report'],
  reproduce: ['errors', 'runtime', 'files', 'model', 'train', 'eval', 'theory', 'index', 'report', 'demo'],
  cli: [
    'errors',
    'rope',
    'runtime',
    'files',
    'model',
    'train',
    'eval',
    'theory',
    'index',
    'report',
    'bench',
    'demo',
    'reproduce',
  ],
}

/** lib/model/llama.ts is of `model`, lib/rope.ts of `rope`. */
const layerOf = (path: string): string => path.split('/')[1]!.replace(/\.ts$/, '')

/** What is wrong with the imports of a file of lib. */
function badImports(path: string, imports: readonly string[]): string[] {
  const layer = layerOf(path)
  const allowed = MAY_IMPORT[layer]
  if (!allowed) return [`${path}: no rule knows the layer "${layer}"`]
  const bad: string[] = []
  for (const name of imports) {
    if (!name.startsWith('.')) {
      if (layer === 'rope') bad.push(`${path} imports ${name}`)
      continue
    }
    const target = posix.normalize(posix.join(posix.dirname(path), name))
    if (!target.startsWith('lib/')) {
      // the command line may read package.json for its version
      if (layer !== 'cli' && layer !== 'runtime') bad.push(`${path} imports ${name}, outside lib`)
      continue
    }
    const to = layerOf(target.replace(/\.js$/, '.ts'))
    if (to !== layer && !allowed.includes(to)) bad.push(`${path} imports ${name}: ${layer} may not know ${to}`)
    if (!name.endsWith('.js') && !name.endsWith('.json')) bad.push(`${path} imports ${name} without its ending`)
  }
  return bad
}

t.test('lib imports downwards only', async (t) => {
  const files = filesIn('lib', /\.ts$/)
  t.ok(files.length > 5, 'there are files to look at')
  t.ok(
    files.some((path) => importsOf(path).length > 2),
    'and imports in them',
  )
  t.strictSame(
    files.flatMap((path) => badImports(path, importsOf(path))),
    [],
  )
  // the rules themselves
  for (const [path, name] of [
    ['lib/rope.ts', './errors.js'],
    ['lib/rope.ts', 'node:fs'],
    ['lib/files/json.ts', '../model/config.js'],
    ['lib/runtime/device.ts', '../model/llama.js'],
    ['lib/train/trainer.ts', '../eval/perplexity.js'],
    ['lib/eval/perplexity.ts', '../train/trainer.js'],
    ['lib/model/llama.ts', '../train/trainer.js'],
    ['lib/model/llama.ts', '../cli/plan.js'],
    ['lib/train/trainer.ts', '../index.js'],
    ['lib/model/llama.ts', './config'],
    ['lib/misc/x.ts', './y.js'],
  ] as const) {
    t.equal(badImports(path, [name]).length, 1, `${path} may not import ${name}`)
  }
  t.strictSame(badImports('lib/model/llama.ts', ['../runtime/device.js', './config.js', 'node:fs', '../rope.js']), [])
})

// ---- csrc ----

const sources = filesIn('csrc', /\.(h|cc|cu|cuh|def)$/)
const includesOf = (path: string): string[] =>
  [...read(path).matchAll(/^\s*#\s*include\s*[<"]([^>"]+)[>"]/gm)].map(([, name]) => name!)

t.test('napi.h in addon.cc only, CUDA headers in csrc/cuda only, backends know nothing of JavaScript', async (t) => {
  const bad: string[] = []
  for (const path of sources) {
    for (const name of includesOf(path)) {
      if (/napi|node_api|\bv8\.h|\buv\.h|js_native_api/.test(name) && path !== 'csrc/addon.cc')
        bad.push(`${path} includes ${name}`)
      if (/cuda|cublas|cudnn|nccl/.test(name) && !path.startsWith('csrc/cuda/')) bad.push(`${path} includes ${name}`)
      const [, , backend] = /^csrc\/((cpu|cuda|simt)\/)/.exec(path) ?? []
      if (backend) {
        const other = /(?:^|\/)(cpu|cuda|simt)\//.exec(name)?.[1]
        // simt takes CUDA's place under the two headers that know which compiler it is
        const standIn = backend === 'cuda' && other === 'simt' && /\/(device|ptx|ptx90)\.h$/.test(path)
        if (other && other !== backend && !standIn) bad.push(`${path} includes ${name}`)
        if (/(?:^|\/)(addon|loader|plan)\.h$/.test(name)) bad.push(`${path} includes ${name}`)
      }
    }
  }
  t.strictSame(bad, [])
  t.ok(includesOf('csrc/addon.cc').includes('napi.h'), 'addon.cc does')
})

// Everything but backend.cc and kernels.cc, the backend's own two files, is compiled once per instruction set: an inline
// function of the standard library compiled there with AVX-512 could be the one that the linker keeps for all.
const kernelFiles = filesIn('csrc/cpu', /\.(h|cc)$/).filter((path) => !/\/backend\.(h|cc)$/.test(path))
const KERNEL_HEADERS = new Set([
  'cstddef',
  'cstdint',
  'cstring',
  'type_traits',
  'utility',
  'immintrin.h',
  'arm_neon.h',
  '../ops.h',
  '../ops.def',
  '../adamw.h',
  '../quantized.h',
])

t.test('kernels include plain headers and use no containers of the standard library', async (t) => {
  const bad: string[] = []
  const own = new Set(kernelFiles.filter((path) => path.endsWith('.h')).map((path) => basename(path)))
  for (const path of kernelFiles) {
    for (const name of includesOf(path))
      if (!KERNEL_HEADERS.has(name) && !own.has(name)) bad.push(`${path} includes ${name}`)
    const code = read(path).replace(/\/\/.*$/gm, '')
    for (const [name] of code.matchAll(/\bstd::(\w+)/g)) {
      if (
        !/^std::(integer_sequence|make_integer_sequence|index_sequence|make_index_sequence|size_t|u?int\d+_t|(?:remove|add)_\w+_t|conditional_t|is_\w+_v)$/.test(
          name,
        )
      ) {
        bad.push(`${path} uses ${name}`)
      }
    }
    for (const [word] of code.matchAll(/\b(?:new|delete|malloc|free|throw|assert|abort|exit|printf)\b/g))
      bad.push(`${path} says ${word}`)
  }
  t.strictSame(bad, [])
  t.ok(kernelFiles.length > 5, 'there are kernels')
})

t.test('shipped code does not end the process', async (t) => {
  const bad: string[] = []
  for (const path of sources) {
    if (path.startsWith('csrc/simt/')) continue // for tests only
    const code = read(path).replace(/\/\/.*$/gm, '')
    for (const [word] of code.matchAll(/\b(?:assert|abort|exit|_exit|quick_exit|terminate)\s*\(/g))
      bad.push(`${path} says ${word}`)
  }
  for (const path of filesIn('lib', /\.ts$/).filter((name) => !name.startsWith('lib/cli/'))) {
    if (/\bprocess\.(exit|abort)\b/.test(read(path))) bad.push(`${path} ends the process`)
  }
  t.strictSame(bad, [])
})

t.test('every op has its kernel and its tests, stems are the same everywhere', async (t) => {
  const definitions = new Map<string, string>()
  for (const path of kernelFiles.filter((name) => name.endsWith('.cc'))) {
    for (const [, op] of read(path).matchAll(/^void (\w+)\(Context&[^)]*const (\w+)_args&/gm))
      definitions.set(op!, path)
  }
  const tests = filesIn('test/ops', /\.test\.ts$/)
  const testText = new Map(tests.map((path) => [path, read(path)]))
  const bad: string[] = []
  for (const { name } of OPS) {
    const kernel = definitions.get(name)
    if (!kernel) bad.push(`no file of csrc/cpu defines ${name}`)
    // matmul_nn is asked for as matmul_${layout}
    const family = name.replace(/_(nn|nt|tn)$/, '_${layout}')
    if (![...testText.values()].some((text) => text.includes(`'${name}'`) || text.includes(`\`${family}\``))) {
      bad.push(`no file of test/ops runs ${name}`)
    }
  }
  const stems = new Set([...definitions.values()].map((path) => basename(path, '.cc')))
  for (const path of tests) {
    const stem = basename(path, '.test.ts')
    if (![...stems].some((kernel) => kernel === stem || kernel.startsWith(`${stem}_`)))
      bad.push(`${path} tests no file of csrc/cpu`)
  }
  for (const stem of stems) {
    if (!tests.some((path) => `${stem}_`.startsWith(`${basename(path, '.test.ts')}_`)))
      bad.push(`csrc/cpu/${stem}.cc has no test/ops file`)
  }
  for (const path of filesIn('csrc/cuda', /\.cu$/)) {
    if (!existsSync(join(root, 'csrc/cpu', `${basename(path, '.cu').replace(/_sm\d+$/, '')}.cc`)))
      bad.push(`${path} has no twin in csrc/cpu`)
  }
  t.strictSame(bad, [])
})

t.test('the emitters are those of the table', async (t) => {
  const { status, stderr, stdout } = spawnSync(process.execPath, ['scripts/ops.js', '--check'], {
    cwd: root,
    encoding: 'utf8',
  })
  t.equal(status, 0, `${stdout}${stderr}`)
})

t.test('inline PTX lives in ptx.h, launches in device.h', async (t) => {
  const cuda = filesIn('csrc/cuda', /\.(h|cu|cuh|cc)$/)
  // ptx90.h holds the instructions of sm_90a, glibc.cc names symbol versions, fiber.cc switches stacks
  const withAssembly = ['csrc/cuda/ptx.h', 'csrc/cuda/ptx90.h', 'csrc/glibc.cc', 'csrc/simt/fiber.cc']
  const bad: string[] = []
  for (const path of sources) {
    const code = read(path).replace(/\/\/.*$/gm, '')
    if (/\b(?:__)?asm(?:__)?\b\s*(?:volatile\b|__volatile__\b)?\s*\(/.test(code) && !withAssembly.includes(path))
      bad.push(`${path} has inline assembly`)
    if (/<<</.test(code) && !(path.startsWith('csrc/cuda/') && basename(path) === 'device.h'))
      bad.push(`${path} launches with <<<`)
  }
  t.strictSame(bad, [], `${cuda.length} files of csrc/cuda`)
})

t.test('every wrapper of an instruction has its self-test', async (t) => {
  const tests = filesIn('test/simt', /\.cu$/).map(read).join()
  const untested: string[] = []
  for (const path of ['csrc/cuda/ptx.h', 'csrc/cuda/ptx90.h']) {
    for (const [, name] of read(path).matchAll(/^__device__ __forceinline__ [\w ]*?\b(\w+)\(/gm)) {
      // what the wrappers make addresses with, and a comment in the assembly
      if (name === 'shared_address' || name === 'note_dyn_smem') continue
      if (!new RegExp(`\\b${name!}[(<]`).test(tests)) untested.push(`${path}: ${name}`)
    }
  }
  t.strictSame(untested, [])
})

// ---- files ----

t.test('no file is longer than 500 lines', async (t) => {
  const long = [...filesIn('lib', /\.ts$/), ...sources]
    .filter((path) => !path.endsWith('.gen.ts'))
    .map((path) => [path, read(path).split('\n').length - 1] as const)
    .filter(([, lines]) => lines > 500)
  t.strictSame(long, [])
})

const TEXT = new Set([
  '.ts',
  '.js',
  '.mjs',
  '.json',
  '.md',
  '.cc',
  '.h',
  '.cu',
  '.def',
  '.txt',
  '.yml',
  '.yaml',
  '.gyp',
  '.sh',
  '.map',
  '',
])

/** Tracked files and those that would be; none where this is no git checkout. */
function trackedFiles(): string[] {
  try {
    const list = execFileSync('git', ['ls-files', '-z', '--cached', '--others', '--exclude-standard'], {
      cwd: root,
      encoding: 'utf8',
      stdio: 'pipe',
    })
    return list.split('\0').filter((path) => path !== '')
  } catch {
    return []
  }
}
const tracked = trackedFiles()
const notGit = tracked.length === 0 && 'skipped: not a git checkout'

t.test('nothing of the machine it was written on stands in a tracked file', { skip: notGit }, async (t) => {
  const self = relative(root, fileURLToPath(import.meta.url))
  const bad: string[] = []
  for (const path of tracked) {
    const full = join(root, path)
    if (path === self || !TEXT.has(extname(path)) || !existsSync(full) || statSync(full).size > 5_000_000) continue
    for (const [i, line] of read(path).split('\n').entries()) {
      // a path of a machine, not a part of an address or of another path
      if (/(?:^|[\s"'`(=:])\/(?:work|home|root|Users|mnt)\/[\w.]/.test(line))
        bad.push(`${path}:${i + 1} names a folder of a machine`)
      for (const [, host] of line.matchAll(/"resolved":\s*"https?:\/\/([^/"]+)/g)) {
        if (host !== 'registry.npmjs.org') bad.push(`${path}:${i + 1} names the registry ${host}`)
      }
      if (
        path !== 'package-lock.json' &&
        /\bregistry\.(?!npmjs\.org)[\w-]+\.\w+|\/(?:npm|pypi)\/(?:simple|registry)|(?:^|\s)(?:registry|index-url)\s*=/.test(
          line,
        )
      ) {
        bad.push(`${path}:${i + 1} names a registry`)
      }
    }
  }
  t.strictSame(bad, [])
  t.ok(tracked.length > 20, `${tracked.length} files`)
})

const objects = filesIn('.cmake', /\.cc\.o$/).filter((path) => /\/cpu_(baseline|avx2|avx512)\.dir\//.test(path))
const noObjects =
  objects.length === 0
    ? 'skipped: the addon was not built here'
    : spawnSync('nm', ['--version']).error !== undefined && 'skipped: there is no nm'

t.test('kernels of one instruction set leave no weak symbols for another one', { skip: noObjects }, async (t) => {
  const bad: string[] = []
  for (const path of objects) {
    const isa = /\/cpu_(\w+)\.dir\//.exec(path)![1]!
    const listing = execFileSync('nm', ['-C', '--defined-only', join(root, path)], {
      encoding: 'utf8',
      maxBuffer: 1 << 26,
    })
    for (const line of listing.split('\n')) {
      const [, type, name] = /^[0-9a-f]* +([WVwvu]) (.*)$/.exec(line) ?? []
      if (type && !name!.includes(`rw::cpu::${isa}::`)) bad.push(`${path}: ${name}`)
    }
  }
  t.strictSame(bad, [], `${objects.length} objects`)
})

const noReadme = !existsSync(join(root, 'README.md')) && 'skipped: there is no README.md'

t.test('the annotated tree of the README names every folder of csrc and lib', { skip: noReadme }, async (t) => {
  const readme = read('README.md')
  const missing = ['csrc', 'lib'].flatMap((top) =>
    foldersIn(top)
      .filter((name) => !new RegExp(`^\\s+${name}/`, 'm').test(readme) && !readme.includes(`${top}/${name}`))
      .map((name) => `${top}/${name}`),
  )
  t.strictSame(missing, [])
})
