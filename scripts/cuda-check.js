// Compiles every CUDA kernel for sm_80 and sm_90a, which takes nvcc but no GPU, and compares what came out with
// docs/kernels.md: registers, shared memory, blocks that fit on a multiprocessor, tensor-core instructions. Any spill and
// any stack frame fails. `--update` rewrites the page. Results are kept in .cmake/cuda-check by the content of what they
// were made from. The programs that `npm run gpu` builds must compile too. Ends with "cuda-check: N passed, N failed, N
// skipped".
import { execFileSync, spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { root } from './setup.js'

const ARCHS = ['sm_80', 'sm_90a']
const PAGE = join(root, 'docs', 'kernels.md')
const CACHE = join(root, '.cmake', 'cuda-check')
const FOLDER = join(root, 'csrc', 'cuda')
const PROGRAMS = join(root, 'test', 'simt')
/** As in CMakeLists.txt. */
const FLAGS = ['-std=c++17', '-O3', '-DNDEBUG', `-I${join(root, 'csrc')}`, '-Xptxas', '-v']
/** Their updates have the same bits on every backend (csrc/adamw.h). */
const NO_CONTRACTION = ['adamw.cu', 'adamw_8bit.cu']
const virtual = (arch) => arch.replace('sm', 'compute')
const TARGETS = ARCHS.flatMap((arch) => ['-gencode', `arch=${virtual(arch)},code=${arch}`])
const PARALLEL = 2

/** Lower 12 bits of an instruction of sm_80 and sm_90. LDL and STL are the spills that ptxas does not call so. */
const OPCODES = { HMMA: 0x23c, LDSM: 0x83b, LDGSTS: 0xfae, LDL: 0x983, STL: 0x387 }
const COUNTED = ['HMMA', 'LDSM', 'LDGSTS']

/** Of a multiprocessor (CUDA C++ Programming Guide, technical specifications). */
const SM = { sm_80: { smem: 164 * 1024 }, sm_90a: { smem: 228 * 1024 } }
const SM_WARPS = 64
const SM_BLOCKS = 32
const QUARTER_REGISTERS = 16384

async function main(update) {
  const version = nvccVersion()
  if (!version) {
    console.log('cuda-check: there is no nvcc on PATH\ncuda-check: 0 passed, 0 failed, 1 skipped')
    return update ? 1 : 0
  }
  const files = readdirSync(FOLDER).filter((name) => name.endsWith('.cu'))
  const kernels = await compileAll(files.sort(), version)
  const problems = kernels.flatMap(faults)
  if (update) writeFileSync(PAGE, page(kernels, version))
  else problems.push(...compare(kernels, readPage(readFileSync(PAGE, 'utf8')), version))
  const programs = readdirSync(PROGRAMS).filter((name) => /^conformance.*\.cu$/.test(name))
  problems.push(...(await Promise.all(programs.map(buildProgram))).flat())
  for (const problem of problems) console.error(`not ok: ${problem}`)
  console.log(
    `cuda-check: ${kernels.length} kernels, ${programs.length} programs, ${ARCHS.join(' and ')}, nvcc ${version}`,
  )
  const failed = new Set(problems.map((problem) => problem.split(': ')[0])).size
  console.log(
    `cuda-check: ${Math.max(0, kernels.length + programs.length - failed)} passed, ${failed} failed, 0 skipped`,
  )
  return problems.length > 0 ? 1 : 0
}

function nvccVersion() {
  try {
    return /release (\d+\.\d+)/.exec(execFileSync('nvcc', ['--version'], { encoding: 'utf8' }))?.[1]
  } catch {
    return undefined
  }
}

// ---- compiling ----

/** All kernels of the files, several files at a time. */
async function compileAll(files, version) {
  const results = []
  let next = 0
  const work = async () => {
    while (next < files.length) {
      const at = next++
      results[at] = await compile(files[at], version)
    }
  }
  await Promise.all(Array.from({ length: PARALLEL }, work))
  return results.flat()
}

/** A file's kernels, sorted by name; taken from the cache where nothing has changed. */
async function compile(file, version) {
  const hash = createHash('sha256')
    .update(`${version} ${FLAGS.slice(0, 3)}`)
    .update(readFileSync(import.meta.filename))
  for (const path of sourcesOf(join(FOLDER, file))) hash.update(readFileSync(path))
  const key = hash.digest('hex')
  const cached = join(CACHE, `${file}.json`)
  if (existsSync(cached)) {
    const kept = JSON.parse(readFileSync(cached, 'utf8'))
    if (kept.key === key) return kept.kernels
  }
  const work = mkdtempSync(join(tmpdir(), 'ropewalk-cuda-'))
  try {
    const stem = basename(file, '.cu')
    const output = ['--keep', '--keep-dir', work, '-c', join(FOLDER, file), '-o', join(work, `${stem}.o`)]
    const own = NO_CONTRACTION.includes(file) ? ['-fmad=false'] : []
    const log = await run('nvcc', [...FLAGS, ...own, ...TARGETS, ...output])
    const byName = new Map()
    for (const arch of ARCHS) {
      const from = (ending) => join(work, `${stem}.${virtual(arch)}.${ending}`)
      const launch = readPtx(readFileSync(from('ptx'), 'utf8'))
      const counts = readCubin(readFileSync(from('cubin')))
      for (const [symbol, used] of readLog(log, arch)) {
        if (!byName.has(symbol)) byName.set(symbol, { file, name: '', archs: {} })
        byName.get(symbol).archs[arch] = { ...used, ...launch.get(symbol), ...counts.get(symbol) }
      }
    }
    const symbols = [...byName.keys()]
    const names = symbols.length > 0 ? demangle(symbols) : []
    symbols.forEach((symbol, i) => (byName.get(symbol).name = names[i]))
    const kernels = [...byName.values()].sort((a, b) => a.name.localeCompare(b.name, 'en', { numeric: true }))
    mkdirSync(CACHE, { recursive: true })
    writeFileSync(cached, JSON.stringify({ key, kernels }))
    return kernels
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}

/** A program of `npm run gpu` (gpu-parts.js) must compile without a warning. */
async function buildProgram(name) {
  const flags = ['-std=c++17', '-O2', '-Werror', 'all-warnings', `-I${join(root, 'csrc')}`]
  try {
    await run('nvcc', [...flags, ...TARGETS, '-c', join(PROGRAMS, name), '-o', '/dev/null'])
    return []
  } catch (error) {
    return [`${name}: ${error.message}`]
  }
}

/** A file and what it includes of this project, directly or through others; other files change nothing about it. */
function sourcesOf(path, found = new Set()) {
  if (found.has(path)) return found
  found.add(path)
  for (const [, name] of readFileSync(path, 'utf8').matchAll(/^\s*#\s*include "([^"]+)"/gm)) {
    const included = join(dirname(path), name)
    // simt/ takes the place of CUDA for a host compiler only
    if (!included.includes('simt')) sourcesOf(included, found)
  }
  return found
}

/** What a command says on both streams. */
function run(command, args) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args)
    let text = ''
    for (const stream of [child.stdout, child.stderr]) stream.setEncoding('utf8').on('data', (part) => (text += part))
    child.on('error', reject)
    child.on('close', (code) =>
      code === 0 ? resolve(text) : reject(new Error(`${[command, ...args].join(' ')} ended with ${code}\n${text}`)),
    )
  })
}

/** ptxas -v: symbol -> registers, bytes of stack, spills and static shared memory. */
export function readLog(text, arch) {
  const found = new Map()
  const entries = text.split(/^ptxas info\s*: Compiling entry function /m).slice(1)
  for (const entry of entries) {
    const [, symbol, target] = /^'(\w+)' for '(\w+)'/.exec(entry)
    if (target !== arch) continue
    const number = (pattern) => Number(pattern.exec(entry)?.[1] ?? 0)
    found.set(symbol, {
      registers: number(/Used (\d+) registers/),
      stack: number(/(\d+) bytes stack frame/),
      spills: number(/(\d+) bytes spill stores/) + number(/(\d+) bytes spill loads/),
      staticSmem: number(/(\d+) bytes smem/),
    })
  }
  return found
}

/** PTX: symbol -> threads of a block (__launch_bounds__), bytes of dynamic shared memory (the note of dyn_smem). */
export function readPtx(text) {
  const found = new Map()
  for (const entry of text.split(/^(?=(?:\.visible |\.weak )?\.entry )/m).slice(1)) {
    const [, symbol] = /\.entry (\w+)/.exec(entry)
    const [, x = 0, y = 1, z = 1] = /\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?/.exec(entry) ?? []
    const notes = [...entry.matchAll(/\/\/ dyn_smem (\d+)/g)].map(([, bytes]) => Number(bytes))
    found.set(symbol, { threads: x * y * z, dynamicSmem: Math.max(0, ...notes) })
  }
  return found
}

/** An ELF file of machine code: symbol -> how often each of OPCODES occurs. Instructions have 16 bytes. */
export function readCubin(bytes) {
  const at = (offset) => Number(bytes.readBigUInt64LE(offset))
  const section = (i) => at(40) + i * bytes.readUInt16LE(58)
  const strings = at(section(bytes.readUInt16LE(62)) + 24)
  const found = new Map()
  for (let i = 0; i < bytes.readUInt16LE(60); i++) {
    const start = strings + bytes.readUInt32LE(section(i))
    const name = bytes.toString('latin1', start, bytes.indexOf(0, start))
    if (!name.startsWith('.text.')) continue
    const counts = Object.fromEntries(Object.keys(OPCODES).map((key) => [key, 0]))
    const code = at(section(i) + 24)
    for (let pc = code; pc < code + at(section(i) + 32); pc += 16) {
      const opcode = bytes.readUInt16LE(pc) & 0xfff
      for (const [key, value] of Object.entries(OPCODES)) if (opcode === value) counts[key]++
    }
    found.set(name.slice('.text.'.length), counts)
  }
  return found
}

/** Names as in the source, without namespaces and parameters. */
function demangle(symbols) {
  const names = execFileSync('c++filt', ['-p', ...symbols], { encoding: 'utf8', maxBuffer: 1 << 26 })
  return names
    .trim()
    .split('\n')
    .map((name) => name.replace(/rw::(cuda::)?|\(anonymous namespace\)::/g, ''))
}

// ---- judging ----

/** Blocks of a kernel that fit on a multiprocessor at once; undefined where its size is not known before the launch. */
export function blocksPerSm(arch, { registers, threads, staticSmem, dynamicSmem }) {
  if (!threads || byShape(dynamicSmem)) return undefined
  const warps = Math.ceil(threads / 32)
  const warpRegisters = Math.ceil((registers * 32) / 256) * 256
  const warpsByRegisters = 4 * Math.floor(QUARTER_REGISTERS / warpRegisters)
  const smem = Math.ceil((staticSmem + dynamicSmem + 1024) / 128) * 128 // 1 KB of each block is the system's
  return Math.min(SM_BLOCKS, Math.floor(Math.min(SM_WARPS, warpsByRegisters) / warps), Math.floor(SM[arch].smem / smem))
}

/** dyn_smem of a single number: an array whose length depends on the shape. */
const byShape = (bytes) => bytes > 0 && bytes < 16

const label = ({ file, name }) => `${file} ${name}`

/** What no kernel may have. */
function faults(kernel) {
  return ARCHS.flatMap((arch) => {
    const { spills, stack, LDL, STL } = kernel.archs[arch]
    const found = []
    if (spills > 0) found.push(`${spills} bytes of spills`)
    if (stack > 0) found.push(`${stack} bytes of stack frame`)
    if (LDL + STL > 0) found.push(`${LDL + STL} accesses to local memory`)
    return found.map((fault) => `${label(kernel)}: ${arch}: ${fault}`)
  })
}

/** A row of the page: what is compared. */
function row(kernel) {
  const { archs } = kernel
  const first = archs[ARCHS[0]]
  const both = (value) => ARCHS.map((arch) => value(arch) ?? '-').join(', ')
  return {
    threads: String(first.threads || '-'),
    registers: both((arch) => archs[arch].registers),
    'static smem': String(first.staticSmem),
    'dynamic smem': byShape(first.dynamicSmem) ? 'by shape' : String(first.dynamicSmem),
    'blocks an SM': both((arch) => blocksPerSm(arch, archs[arch])),
    ...Object.fromEntries(COUNTED.map((key) => [key, String(first[key])])),
  }
}

/** Where kernels differ from the page, for the worse or in what they are. */
export function compare(kernels, { version: written, rows }, version) {
  const update = 'npm run cuda:check -- --update'
  if (written !== version) {
    console.log(
      `cuda-check: docs/kernels.md is of nvcc ${written}, this is ${version}: only spills and stacks are checked`,
    )
    return []
  }
  const problems = []
  const seen = new Set()
  for (const kernel of kernels) {
    const key = label(kernel)
    seen.add(key)
    const budget = rows.get(key)
    if (!budget) {
      problems.push(`${key}: is not in docs/kernels.md: ${update}`)
      continue
    }
    const figures = row(kernel)
    for (const [column, value] of Object.entries(figures)) {
      const worse =
        column === 'registers'
          ? pairs(value, budget[column]).some(([now, then]) => now > then)
          : column === 'blocks an SM'
            ? pairs(value, budget[column]).some(([now, then]) => now < then)
            : value !== budget[column]
      if (worse)
        problems.push(`${key}: ${column} ${value}, but docs/kernels.md says ${budget[column]}: mend it, or ${update}`)
    }
  }
  for (const key of rows.keys()) if (!seen.has(key)) problems.push(`${key}: is in docs/kernels.md only: ${update}`)
  return problems
}

const pairs = (now, then) => {
  const [a, b] = [now, then ?? ''].map((text) => text.split(', ').map(Number))
  return a.map((value, i) => [value, b[i]])
}

// ---- the page ----

const COLUMNS = ['threads', 'registers', 'static smem', 'dynamic smem', 'blocks an SM', ...COUNTED]

function page(kernels, version) {
  const lines = [
    '# The CUDA kernels in figures',
    '',
    `Generated by \`npm run cuda:check -- --update\`, which needs nvcc but no GPU; \`npm run cuda:check\` compares. nvcc ${version}.`,
    '',
    'Threads of a block, registers of a thread (sm_80, sm_90a), bytes of shared memory of a block, blocks that fit on a',
    'multiprocessor at once (A100, H100), and instructions in the code of sm_80: HMMA multiplies on the tensor cores, LDSM',
    'loads fragments from shared memory, LDGSTS copies from global to shared memory without registers. More registers or',
    'fewer blocks than here, another size or count, any spill and any stack frame fail the check.',
  ]
  for (const file of new Set(kernels.map((kernel) => kernel.file))) {
    lines.push(
      '',
      `## ${file}`,
      '',
      `| kernel | ${COLUMNS.join(' | ')} |`,
      `|---|${COLUMNS.map(() => '---|').join('')}`,
    )
    for (const kernel of kernels.filter((other) => other.file === file)) {
      const figures = row(kernel)
      lines.push(`| \`${kernel.name}\` | ${COLUMNS.map((column) => figures[column]).join(' | ')} |`)
    }
  }
  return `${lines.join('\n')}\n`
}

export function readPage(text) {
  const rows = new Map()
  let file = ''
  for (const line of text.split('\n')) {
    file = /^## (.*)$/.exec(line)?.[1] ?? file
    const [, name, rest] = /^\| `(.+)` \| (.*) \|$/.exec(line) ?? []
    if (!name) continue
    const values = rest.split(' | ')
    rows.set(`${file} ${name}`, Object.fromEntries(COLUMNS.map((column, i) => [column, values[i]])))
  }
  return { version: /nvcc (\d+\.\d+)/.exec(text)?.[1], rows }
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) process.exit(await main(process.argv.includes('--update')))
