// Generates lib/runtime/ops.gen.ts, the typed emitters, and docs/ops.md from csrc/ops.def. No dependencies:
// `npm run build:ops`. With --check it writes nothing and fails where a committed file is stale.
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const path = (relative) => fileURLToPath(new URL(relative, import.meta.url))
const source = readFileSync(path('../csrc/ops.def'), 'utf8')
const rows = parse(source)

/** Name and text of every row; a parenthesis inside a row is always balanced. */
function* rowTexts(text) {
  const code = text.replace(/\/\/.*$/gm, '')
  for (let at = code.indexOf('OP('); at >= 0; at = code.indexOf('OP(', at + 1)) {
    let depth = 0
    let end = at + 2
    do {
      if (code[end] === '(') depth++
      if (code[end] === ')') depth--
      end++
    } while (depth > 0)
    const [, name, body] = /^OP\((\w+),([\s\S]*)\)$/.exec(code.slice(at, end))
    yield { name, body }
  }
}

function parse(text) {
  const rows = []
  for (const { name, body } of rowTexts(text)) {
    const fields = []
    let flops = '0'
    for (const [, kind, inside] of body.matchAll(/(\w+)\(((?:[^()"]|"[^"]*")*)\)/g)) {
      const parts = inside.match(/"[^"]*"|[^,\s]+/g)
      if (kind === 'FLOPS') flops = parts[0].slice(1, -1)
      else if (kind === 'INT' || kind === 'FLT') fields.push({ kind, name: parts[0] })
      else fields.push({ kind, name: parts[0], dtype: parts[1], dims: parts[2].slice(1, -1).split(' ') })
    }
    rows.push({ name, fields, flops })
  }
  return rows
}

/** Rows that stand together under one comment, or under none after an empty line. */
function groups(text) {
  const found = []
  let comment = []
  let together = false
  for (const line of text.split('\n')) {
    const [, words] = /^\/\/ ?(.*)$/.exec(line) ?? []
    const [, name] = /^OP\((\w+),/.exec(line) ?? []
    if (name) {
      if (together) found.at(-1).names.push(name)
      else found.push({ comment, names: [name] })
      comment = []
      together = true
    } else if (words !== undefined || line === '') {
      if (words === undefined) comment = []
      else comment.push(words)
      together = false
    }
  }
  return found
}

const camel = (name) => name.replace(/_(\w)/g, (_, letter) => letter.toUpperCase())
const pascal = (name) => camel(`_${name}`)

function flopsFunction(expression) {
  const dims = [...new Set(expression.match(/[A-Z]/g) ?? [])]
  return dims.length
    ? `({ ${dims.join(', ')} }) => ${expression.replace(/([*+])/g, ' $1 ').replace(/\s+/g, ' ')}`
    : '() => 0'
}

function emitters() {
  // the comment above a row becomes the docstring of its emitter
  const docs = new Map(groups(source).map(({ comment, names }) => [names[0], comment]))
  const out = []
  out.push('// Generated from csrc/ops.def by scripts/ops.js (`npm run build:ops`). Edit the table, not this file.')
  out.push("import type { OpRow, Recorder } from './recorder.js'")
  out.push("import type { Tensor } from './tensor.js'")
  out.push('')
  out.push('export const OPS = [')
  rows.forEach((row, opcode) => {
    out.push('  {')
    out.push(`    name: '${row.name}',`)
    out.push(`    opcode: ${opcode},`)
    out.push('    fields: [')
    for (const field of row.fields) {
      out.push(
        field.dims
          ? `      { kind: '${field.kind}', name: '${field.name}', dtype: '${field.dtype}', dims: [${field.dims.map((dim) => `'${dim}'`).join(', ')}] },`
          : `      { kind: '${field.kind}', name: '${field.name}' },`,
      )
    }
    out.push('    ],')
    out.push(`    flops: ${flopsFunction(row.flops)},`)
    out.push('  },')
  })
  out.push('] as const satisfies readonly OpRow[]')
  for (const [opcode, row] of rows.entries()) {
    const outputs = row.fields.filter((field) => field.kind === 'OUT')
    const inputs = row.fields.filter((field) => field.kind !== 'TMP')
    out.push('')
    out.push(`export interface ${pascal(row.name)} {`)
    for (const field of inputs) {
      const optional = ['OPT', 'OPT_INOUT', 'OPT_OUT', 'OUT'].includes(field.kind)
      const type = field.dims ? 'Tensor' : 'number'
      const shape = field.dims ? ` // ${field.dtype} (${field.dims.join(',')})` : ''
      out.push(`  ${field.name}${optional ? '?' : ''}: ${type}${optional ? ' | undefined' : ''}${shape}`)
    }
    out.push('}')
    out.push('')
    const doc = docs.get(row.name) ?? []
    if (doc.length === 1) out.push(`/** ${doc[0]} */`)
    if (doc.length > 1) out.push('/**', ...doc.map((line) => ` * ${line}`), ' */')
    const result = outputs.length ? `{ ${outputs.map((field) => `${field.name}: Tensor`).join('; ')} }` : 'void'
    out.push(`export function ${camel(row.name)}(recorder: Recorder, args: ${pascal(row.name)}): ${result} {`)
    out.push(
      outputs.length
        ? `  return recorder.emit(OPS[${opcode}], args) as ${result}`
        : `  recorder.emit(OPS[${opcode}], args)`,
    )
    out.push('}')
  }
  // The same FNV-1a as csrc/ops.h, over the same text, so that a stale addon is recognised.
  let hash = 0xcbf29ce484222325n
  for (const byte of Buffer.from(tableText(source))) hash = BigInt.asUintN(64, (hash ^ BigInt(byte)) * 0x100000001b3n)
  out.push('')
  out.push('/** Of the table; the addon and every backend must have been built from the same one. */')
  out.push(`export const TABLE_HASH = '${hash.toString(16).padStart(16, '0')}'`)
  return out.join('\n') + '\n'
}

/** What the preprocessor makes of `#name " " #row "\n"` for every row: comments gone, white space folded to one space. */
function tableText(text) {
  let result = ''
  for (const { name, body } of rowTexts(text)) result += `${name} ${body.replace(/\s+/g, ' ').trim()}\n`
  return result
}

/** The page of the ops: the head of the table as its introduction, then every group of rows with its comment. */
function page() {
  const byName = new Map(rows.map((row) => [row.name, row]))
  const head = /^(?:\/\/.*\n)+/.exec(source)[0].replace(/^\/\/ ?/gm, '')
  const out = ['<!-- Generated from csrc/ops.def by scripts/ops.js (`npm run build:ops`). -->', '', '# Operations', '']
  for (const paragraph of head.trimEnd().split('\n\n')) {
    out.push(...(paragraph.startsWith(' ') ? fenced(paragraph.split('\n')) : [paragraph]), '')
  }
  out.push('Below, `?` marks what may be absent.', '')
  for (const { comment, names } of groups(source)) {
    out.push(`## ${names.join(', ')}`, '')
    if (comment.length > 0) out.push(...comment, '')
    out.push(...fenced(names.flatMap((name) => describe(byName.get(name)))), '')
  }
  return out.join('\n').trimEnd() + '\n'
}

const fenced = (lines) => ['```text', ...lines, '```']

const ROLES = {
  reads: ['IN', 'OPT'],
  updates: ['INOUT', 'OPT_INOUT'],
  writes: ['OUT', 'OPT_OUT'],
  scratch: ['TMP'],
  scalars: ['INT', 'FLT'],
}

/** A row for people: what it reads, writes and takes, role by role, in lines of up to 120 columns. */
function describe({ name, fields, flops }) {
  const lines = [name]
  for (const [role, kinds] of Object.entries(ROLES)) {
    const list = fields
      .filter(({ kind }) => kinds.includes(kind))
      .map(({ kind, name, dtype, dims }) => {
        const type = dims ? `${dtype} (${dims.join(',')})` : kind === 'INT' ? 'integer' : 'float'
        return `${name}${kind.startsWith('OPT') ? '?' : ''} ${type}`
      })
    if (list.length === 0) continue
    let line = `  ${role.padEnd(8)} ${list.shift()}`
    for (const item of list) {
      line += ','
      if (line.length + item.length >= 120) {
        lines.push(line)
        line = ' '.repeat(10)
      }
      line += ` ${item}`
    }
    lines.push(line)
  }
  return [...lines, `  ${'FLOPs'.padEnd(8)} ${flops}`]
}

const generated = { 'lib/runtime/ops.gen.ts': emitters(), 'docs/ops.md': page() }
for (const [target, text] of Object.entries(generated)) {
  const file = path(`../${target}`)
  if (!process.argv.includes('--check')) writeFileSync(file, text)
  else if (!existsSync(file) || readFileSync(file, 'utf8') !== text) {
    console.error(`${target} is stale: run \`npm run build:ops\` after a change of csrc/ops.def`)
    process.exitCode = 1
  }
}
