import { parseArgs } from 'node:util'
import { didYouMean, quote } from '../errors.js'
import type { Llama, LoadOptions } from '../index.js'
import type { Output } from './output.js'

/** One option of a command. `value` is what --help calls its value. */
export type Option = {
  help: string
  /** Shown in --help; the value itself is the library's default. */
  default?: string
  required?: boolean
} & (
  | { kind: 'flag' }
  | { kind: 'text'; value: string; choices?: readonly string[] }
  /** One or more values, up to the next option; may be repeated. */
  | { kind: 'texts'; value: string }
  /** `above` is a least value that is itself too small. */
  | { kind: 'number'; value: string; min?: number; above?: number; max?: number; whole?: boolean }
  /** Whole numbers, separated by commas. */
  | { kind: 'numbers'; value: string; min?: number; max?: number }
)

export type OptionTable = Readonly<Record<string, Option>>

type ValueOf<O extends Option> = O['kind'] extends 'flag'
  ? boolean
  : O['kind'] extends 'text'
    ? string
    : O['kind'] extends 'texts'
      ? string[]
      : O['kind'] extends 'number'
        ? number
        : number[]

/** Values by option name; flags are always there, required ones too. */
export type Values<T extends OptionTable> = {
  [K in keyof T as T[K] extends { kind: 'flag' } | { required: true } ? K : never]: ValueOf<T[K]>
} & { [K in keyof T as T[K] extends { kind: 'flag' } | { required: true } ? never : K]?: ValueOf<T[K]> }

/** A command: what --help says, and what it does. */
export interface Command<T extends OptionTable = OptionTable> {
  name: string
  summary: string
  details?: string
  examples: readonly string[]
  /** Names of the arguments without dashes; those that end in ? may be left out. */
  operands: readonly string[]
  options: T
  /** Returns the exit code, 0 by default; a thrown error is one line on stderr and exit code 1. */
  run(input: { operands: string[]; values: Values<T> }, output: Output): Promise<number | void>
}

/** A command line that cannot be understood; exit code 2. */
export class UsageError extends Error {}

/** Options that every command has. */
export const commonOptions = {
  json: { kind: 'flag', help: 'results as JSON on stdout, everything else on stderr' },
  help: { kind: 'flag', help: 'show this help' },
} as const satisfies OptionTable

/** Options of commands that load a model. */
export const modelOptions = {
  device: { kind: 'text', value: 'name', help: 'where to compute: auto, cpu, cuda, cuda:1', default: 'auto' },
  dtype: {
    kind: 'text',
    value: 'type',
    choices: ['float32', 'bfloat16'],
    help: 'how weights are kept',
    default: 'as in the checkpoint',
  },
  threads: { kind: 'number', value: 'n', min: 1, max: 1024, whole: true, help: 'CPU threads', default: 'one a core' },
} as const satisfies OptionTable

/** Options of commands that use a model as it is. */
export const useOptions = {
  adapter: { kind: 'text', value: 'folder', help: 'a LoRA adapter of the model, from extend --lora or PEFT' },
  quantize: {
    kind: 'text',
    value: 'form',
    choices: ['nf4', 'int8'],
    help: 'keep the matrices of the blocks in 4 or 8 bits',
    default: 'as the others',
  },
  ...modelOptions,
  activations: {
    kind: 'text',
    value: 'type',
    choices: ['float32', 'bfloat16'],
    help: 'on a CPU; bfloat16 is faster with AMX',
    default: 'float32',
  },
} as const satisfies OptionTable

export function readUse(values: Values<typeof useOptions>): LoadOptions {
  const { device, dtype, activations, threads, adapter, quantize } = values
  return defined({ device, dtype, activations, threads, adapter, quantize }) as LoadOptions
}

/** What is to be known before a model works: what is unusual about it, and why `auto` is not a GPU. */
export function noteModel({ warnings, device }: Pick<Llama, 'warnings' | 'device'>, output: Output): void {
  for (const warning of warnings) output.note(`warning: ${warning}`)
  if (device.fallback !== undefined) output.note(`on the CPU: ${device.fallback}`)
}

/** The options that are set, under the library's names; --no options stay out, so that its defaults hold. */
export function defined<T extends object>(values: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined)) as never
}

type Syntax<T extends OptionTable = OptionTable> = Pick<Command<T>, 'name' | 'operands' | 'options'>

/** Parses the arguments after the command's name. Throws UsageError that names the argument, the rule and the remedy. */
export function parseOptions<T extends OptionTable>(
  command: Syntax<T>,
  args: readonly string[],
): { operands: string[]; values: Values<T> } {
  const { options } = command
  const fail = (message: string): never => {
    throw new UsageError(`${message} (see: ropewalk ${command.name} --help)`)
  }
  const types = Object.fromEntries(
    Object.entries(options).map(([name, { kind }]) => [
      name,
      { type: kind === 'flag' ? 'boolean' : 'string' } as const,
    ]),
  )
  const { tokens } = parseArgs({ args: glueNegative(args, types), options: types, strict: false, tokens: true })
  const operands: string[] = []
  const values: Record<string, unknown> = {}
  for (const [name, { kind }] of Object.entries(options)) if (kind === 'flag') values[name] = false
  let list: string[] | undefined
  for (const token of tokens) {
    if (token.kind === 'positional') {
      if (list) list.push(token.value)
      else operands.push(token.value)
      continue
    }
    list = undefined
    if (token.kind === 'option-terminator') continue
    const option = Object.hasOwn(options, token.name) ? options[token.name]! : undefined
    if (!option) {
      const known = Object.keys(options).map((name) => `--${name}`)
      return fail(`unknown option ${quote(token.rawName)}${didYouMean(token.rawName, known)}`)
    }
    const { name, value } = token
    if (option.kind === 'flag') {
      if (value !== undefined) fail(`--${name} takes no value, but was given ${quote(value)}`)
      values[name] = true
      continue
    }
    if (value === undefined || value === '') return fail(`--${name} needs a value: --${name} <${option.value}>`)
    if (option.kind === 'texts') {
      list = (values[name] as string[] | undefined) ?? []
      list.push(value)
      values[name] = list
      continue
    }
    if (values[name] !== undefined) fail(`--${name} is given twice`)
    values[name] = readValue(name, option, value, fail)
  }
  const rest = values as Values<T>
  if (values.help) return { operands, values: rest }
  if (operands.length > command.operands.length) {
    fail(`${quote(operands[command.operands.length])} is one argument too many: ropewalk ${usage(command)}`)
  }
  const missing = command.operands[operands.length]
  if (missing && !missing.endsWith('?')) fail(`<${missing}> is missing: ropewalk ${usage(command)}`)
  for (const [name, option] of Object.entries(options)) {
    if (option.required && values[name] === undefined) {
      fail(`--${name} is missing: ${option.help}`)
    }
  }
  return { operands, values: rest }
}

function readValue(
  name: string,
  option: Exclude<Option, { kind: 'flag' | 'texts' }>,
  text: string,
  fail: (message: string) => never,
): unknown {
  if (option.kind === 'text') {
    if (option.choices && !option.choices.includes(text)) {
      fail(`--${name} is ${quote(text)}${didYouMean(text, option.choices)}; it must be ${option.choices.join(' or ')}`)
    }
    return text
  }
  if (option.kind === 'numbers') {
    return text.split(',').map((part) => readNumber(name, { ...option, whole: true }, part.trim(), fail))
  }
  return readNumber(name, option, text, fail)
}

function readNumber(
  name: string,
  rule: { min?: number; above?: number; max?: number; whole?: boolean },
  text: string,
  fail: (message: string) => never,
): number {
  const value = /^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$/i.test(text) ? Number(text) : NaN
  const { above = -Infinity, min = above, max = Infinity, whole } = rule
  const kind = whole ? 'a whole number' : 'a number'
  const bounded = max < Infinity
  let range = ''
  if (above > -Infinity) range = ` above ${above}${bounded ? ` and at most ${max}` : ''}`
  else if (min > -Infinity) range = bounded ? ` from ${min} to ${max}` : ` of at least ${min}`
  if (
    !(value >= min && value <= max && value > above) ||
    !Number.isFinite(value) ||
    (whole && !Number.isSafeInteger(value))
  ) {
    fail(`--${name} is ${quote(text)}, but must be ${kind}${range}`)
  }
  return value
}

/** `--lr -1` becomes `--lr=-1`, so that it is a bad number and not an unknown option "-1". */
function glueNegative(args: readonly string[], types: Record<string, { type: string }>): string[] {
  const glued: string[] = []
  for (const arg of args) {
    const before = glued.at(-1)
    const takesValue = before?.startsWith('--') && types[before.slice(2)]?.type === 'string'
    if (takesValue && /^-[\d.]/.test(arg)) glued[glued.length - 1] = `${before}=${arg}`
    else glued.push(arg)
  }
  return glued
}

function usage({ name, operands, options }: Syntax): string {
  const required = Object.entries(options).filter(([, option]) => option.required)
  const shown = required.map(([option, rule]) => ` --${option} ${placeholder(rule)}`)
  const named = operands.map((operand) => (operand.endsWith('?') ? ` [${operand.slice(0, -1)}]` : ` <${operand}>`))
  return `${name}${named.join('')}${shown.join('')}`
}

const placeholder = (option: Option): string =>
  option.kind === 'flag' ? '' : option.kind === 'texts' ? `<${option.value}>...` : `<${option.value}>`

/** The --help text of a command. */
export function helpText(command: Omit<Command, 'run'>): string {
  const rows = Object.entries(command.options).map(([name, option]): [string, string] => {
    const choices = option.kind === 'text' && option.choices ? ` (${option.choices.join(', ')})` : ''
    const fallback = option.default ? ` [default: ${option.default}]` : ''
    return [
      `--${name} ${placeholder(option)}`.trimEnd(),
      `${option.help}${choices}${option.required ? ' (required)' : ''}${fallback}`,
    ]
  })
  const width = Math.max(...rows.map(([left]) => left.length))
  const lines = rows.map(([left, right]) => `  ${left.padEnd(width)}  ${right}`)
  const optional = Object.values(command.options).some(({ required }) => !required) ? ' [options]' : ''
  return [
    `Usage: ropewalk ${usage(command)}${optional}`,
    command.summary,
    ...(command.details ? [command.details] : []),
    `Options:\n${lines.join('\n')}`,
    `Examples:\n${command.examples.map((example) => `  ${example}`).join('\n')}`,
  ].join('\n\n')
}

/** The command line that gives these operands and values, for people to copy. */
export function commandLine(
  name: string,
  operands: readonly string[],
  values: Readonly<Record<string, unknown>>,
): string {
  const words = [...operands]
  for (const [option, value] of Object.entries(values)) {
    if (value === undefined || value === false) continue
    words.push(`--${option}`)
    if (value === true) continue
    // Numbers of a list are one word, texts of a list one each.
    if (Array.isArray(value) && typeof value[0] === 'number') words.push(value.join(','))
    else words.push(...[value].flat().map(String))
  }
  return ['ropewalk', name, ...words.map(shellWord)].join(' ')
}

const shellWord = (word: string): string =>
  /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`
