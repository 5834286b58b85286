// Builds the CUDA library for sm_80 and sm_90a, which takes nvcc but no GPU, and compares what came out with
// docs/kernels.md: registers, shared memory, blocks that fit on a multiprocessor, tensor-core instructions. Any access to
// local memory (a spill, an array) and any stack frame fails. `--update` rewrites the page. The programs that `npm run gpu`
// builds must compile too. Ends with "cuda-check: N passed, N failed, N skipped".
import { execFileSync, spawn } from 'node:child_process'
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { buildCudaLibrary, NVCC, nvccVersion } from './cuda-library.js'
import { root } from './setup.js'

const ARCHS = ['sm_80', 'sm_90a']
const PAGE = join(root, 'docs', 'kernels.md')
const FOLDER = join(root, 'csrc', 'cuda')
const PROGRAMS = join(root, 'test', 'simt')
const virtual = (arch) => arch.replace('sm', 'compute')
const TARGETS = ARCHS.flatMap((arch) => ['-gencode', `arch=${virtual(arch)},code=${arch}`])

/** Lower 12 bits of an instruction of sm_80 and sm_90. LDL and STL are spills, or arrays that are no registers. */
const OPCODES = { HMMA: 0x23c, LDSM: 0x83b, LDGSTS: 0xfae, LDL: 0x983, STL: 0x387 }
/** Of .nv.info: EIFMT_SVAL, EIATTR_REGCOUNT, EIATTR_FRAME_SIZE. */
const [LONG_VALUE, REGISTERS, FRAME] = [0x04, 0x2f, 0x11]
const COUNTED = ['HMMA', 'LDSM', 'LDGSTS']

/**
 * Bytes of a multiprocessor (CUDA C++ Programming Guide, technical specifications), and those of the system's that a
 * cubin counts as the kernel's own.
 */
const SM = { sm_80: { smem: 164 * 1024, reserved: 0 }, sm_90a: { smem: 228 * 1024, reserved: 1024 } }
/** Of a block whose kernel has not asked for more; launch() asks from so much dynamic memory on. */
const PLAIN_SMEM = 48 * 1024
const ASKED_SMEM = 1024 * Number(/kPlainSmem = (\d+) \* 1024;/.exec(readFileSync(join(FOLDER, 'device.h'), 'utf8'))[1])
const SM_WARPS = 64
const SM_BLOCKS = 32
const QUARTER_REGISTERS = 16384

async function main(update) {
  const version = nvccVersion()
  if (!version) {
    console.log(
      'cuda-check: there is no nvcc on PATH, and CUDACXX names none\ncuda-check: 0 passed, 0 failed, 1 skipped',
    )
    return update ? 1 : 0
  }
  const { kept } = buildCudaLibrary()
  const files = readdirSync(FOLDER).filter((name) => name.endsWith('.cu'))
  const kernels = files.sort().flatMap((file) => kernelsOf(file, kept))
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

/** A file's kernels, sorted by name, from what nvcc kept of its compilation. */
function kernelsOf(file, kept) {
  const stem = basename(file, '.cu')
  const byName = new Map()
  for (const arch of ARCHS) {
    const from = (ending) => readFileSync(join(kept, `${stem}.${virtual(arch)}${ending}`))
    const launch = readPtx(from('.ptx').toString())
    // compute_80 has two forms, and what is of one of them has its name too
    const cubin = readCubin(from(arch === 'sm_80' ? '.sm_80.cubin' : '.cubin'), SM[arch].reserved)
    for (const [symbol, of] of launch) {
      if (!byName.has(symbol)) byName.set(symbol, { file, name: '', archs: {} })
      byName.get(symbol).archs[arch] = { ...of, ...cubin.get(symbol) }
    }
  }
  const symbols = [...byName.keys()]
  const source = textOf(file)
  const names = symbols.length > 0 ? demangle(symbols).map((name) => withEnumerators(name, source)) : []
  symbols.forEach((symbol, i) => (byName.get(symbol).name = names[i]))
  return [...byName.values()].sort((a, b) => a.name.localeCompare(b.name, 'en', { numeric: true }))
}

/** A program of `npm run gpu` (gpu-parts.js) must compile without a warning. */
async function buildProgram(name) {
  const flags = ['-std=c++17', '-O2', '-Werror', 'all-warnings', `-I${join(root, 'csrc')}`]
  try {
    await run(NVCC, [...flags, ...TARGETS, '-c', join(PROGRAMS, name), '-o', '/dev/null'])
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

const textOf = (file) => [...sourcesOf(join(FOLDER, file))].map((path) => readFileSync(path, 'utf8')).join('\n')

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

/**
 * An ELF file of machine code: symbol -> registers, bytes of stack and of static shared memory, how often each of OPCODES
 * occurs. Instructions have 16 bytes. `reserved` bytes of shared memory in every kernel are the system's.
 */
export function readCubin(bytes, reserved) {
  const number = (offset) => Number(bytes.readBigUInt64LE(offset))
  const text = (offset) => bytes.toString('latin1', offset, bytes.indexOf(0, offset))
  const header = (i) => number(40) + i * bytes.readUInt16LE(58)
  const names = number(header(bytes.readUInt16LE(62)) + 24)
  const sections = Array.from({ length: bytes.readUInt16LE(60) }, (_, i) => ({
    name: text(names + bytes.readUInt32LE(header(i))),
    start: number(header(i) + 24),
    size: number(header(i) + 32),
    link: bytes.readUInt32LE(header(i) + 40),
  }))
  const found = new Map()
  const counters = Object.fromEntries(Object.keys(OPCODES).map((key) => [key, 0]))
  for (const { name, start, size } of sections) {
    if (!name.startsWith('.text.')) continue
    const counts = { ...counters }
    for (let pc = start; pc < start + size; pc += 16) {
      const opcode = bytes.readUInt16LE(pc) & 0xfff
      for (const [key, value] of Object.entries(OPCODES)) if (opcode === value) counts[key]++
    }
    found.set(name.slice('.text.'.length), { ...counts, staticSmem: 0 })
  }
  for (const { name, size } of sections) {
    const kernel = found.get(name.slice('.nv.shared.'.length))
    if (kernel && name.startsWith('.nv.shared.')) kernel.staticSmem = size - reserved
  }
  const symbols = sections.find(({ name }) => name === '.symtab')
  const symbolAt = (i) => text(sections[symbols.link].start + bytes.readUInt32LE(symbols.start + 24 * i))
  const { start, size } = sections.find(({ name }) => name === '.nv.info')
  // format, attribute, bytes of the value; a value that long is (symbol, number)
  for (let at = start; at < start + size;) {
    const [format, attribute, length] = [bytes[at], bytes[at + 1], bytes.readUInt16LE(at + 2)]
    at += 4
    if (format !== LONG_VALUE) continue
    const kernel = found.get(symbolAt(bytes.readUInt32LE(at)))
    if (kernel && attribute === REGISTERS) kernel.registers = bytes.readUInt32LE(at + 4)
    if (kernel && attribute === FRAME) kernel.stack = bytes.readUInt32LE(at + 4)
    at += length
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

/** Values of enumerations by their names: "(Wanted)3" as "dk_dv". */
export function withEnumerators(name, source) {
  return name.replace(/\((\w+)\)(\d+)/g, (text, type, value) => {
    const [, list] = new RegExp(`enum class ${type} (?:: \\w+ )?\\{([^}]*)\\}`).exec(source) ?? []
    return list?.split(',')[value]?.trim() || text
  })
}

/** Kernels with the names of what they are templates of: "rmsnorm_fwd_kernel<Warps, Vector, F, W>". */
export function templatesOf(source) {
  const found = source.matchAll(/^template <([^;{]*?)>\s*__global__[^;{]*?\b(\w+_kernel)\(/gm)
  return [...found].map(([, parameters, name]) => {
    const names = parameters.split(',').map((parameter) => parameter.trim().split(/\s+/).at(-1))
    return `${name}<${names.join(', ')}>`
  })
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
    const { registers, stack, staticSmem, dynamicSmem, LDL, STL } = kernel.archs[arch]
    const unasked = byShape(dynamicSmem) ? ASKED_SMEM : Math.min(dynamicSmem, ASKED_SMEM)
    const found = []
    if (!(registers > 0 && stack >= 0)) found.push('its registers and stack are not in the cubin')
    if (stack > 0) found.push(`${stack} bytes of stack frame`)
    if (staticSmem + unasked > PLAIN_SMEM)
      found.push(`${staticSmem + unasked} bytes of shared memory, without asking for it`)
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
    'fewer blocks than here, another size or count, any spill and any stack frame fail the check. Above each table stand',
    'the names of what its kernels are templates of; what they mean, and why tiles have their sizes, says the head of the file.',
  ]
  for (const file of new Set(kernels.map((kernel) => kernel.file))) {
    const own = kernels.filter((kernel) => kernel.file === file)
    const templates = templatesOf(textOf(file))
      .filter((template) => own.some(({ name }) => name.split('<')[0] === template.split('<')[0]))
      .map((template) => `\`${template}\``)
    lines.push(
      '',
      `## ${file}`,
      '',
      ...(templates.length > 0 ? [templates.join(', '), ''] : []),
      `| kernel | ${COLUMNS.join(' | ')} |`,
      `|---|${COLUMNS.map(() => '---|').join('')}`,
    )
    for (const kernel of own) {
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
