import { didYouMean, quote } from '../errors.js'
import { version } from '../index.js'
import { bench } from './bench.js'
import { build } from './build.js'
import { demo } from './demo.js'
import { doctor } from './doctor.js'
import { evalAttention } from './eval-attention.js'
import { evalPasskey, evalPerplexity } from './eval.js'
import { evalChoice } from './eval-choice.js'
import { evalSummaries } from './eval-summaries.js'
import { extend } from './extend.js'
import { generate } from './generate.js'
import { inspect } from './inspect.js'
import { plan } from './plan.js'
import { reproduce } from './reproduce.js'
import { theory } from './theory.js'
import { type Command, helpText, parseOptions, UsageError } from './options.js'
import { Output, type Sink } from './output.js'
import { evalNeedle, evalRuler } from './retrieval.js'

const commands = [
  demo,
  extend,
  evalPerplexity,
  evalPasskey,
  evalChoice,
  evalSummaries,
  evalAttention,
  evalNeedle,
  evalRuler,
  generate,
  inspect,
  plan,
  reproduce,
  theory,
  doctor,
  bench,
  build,
] as unknown as readonly Command[]

/** Names and what they do, a line each. */
function listed(some: readonly Command[]): string {
  const width = Math.max(...some.map(({ name }) => name.length))
  return some.map(({ name, summary }) => `  ${name.padEnd(width)}  ${summary}`).join('\n')
}

/** `ropewalk help` */
function overview(): string {
  return [
    `ropewalk ${version}: stretches the context of LLaMA models`,
    `Usage: ropewalk <command> ...`,
    `Commands:\n${listed(commands)}`,
    'ropewalk <command> --help says more; ropewalk --version prints the version.\n' +
      'ROPEWALK_DEBUG=1 adds the stack to an error. ROPEWALK_MEMORY=24g: the memory of the host that training may take,\n' +
      'in place of what is free.',
  ].join('\n\n')
}

/** `ropewalk eval --help`: the commands that begin with that word; none where it is a command itself. */
function groupOf(first: string | undefined): readonly Command[] {
  return commands.filter(({ name }) => name.startsWith(`${first} `))
}

const groupHelp = (first: string, group: readonly Command[]): string =>
  [
    `Usage: ropewalk ${first} <command> ...`,
    `Commands:\n${listed(group)}`,
    `ropewalk ${first} <command> --help says more.`,
  ].join('\n\n')

/** The command that the arguments begin with; names may have two words. */
function find(args: readonly string[]): { command: Command; rest: readonly string[] } {
  for (const words of [2, 1]) {
    const command = commands.find(({ name }) => name === args.slice(0, words).join(' '))
    if (command) return { command, rest: args.slice(words) }
  }
  const group = groupOf(args[0]).map(({ name }) => name)
  if (group.length > 0) {
    const second = args[1]?.startsWith('-') ? undefined : args[1]
    throw new UsageError(
      second
        ? `there is no command ${quote(`${args[0]} ${second}`)}${didYouMean(`${args[0]} ${second}`, group)}`
        : `${quote(args[0])} needs a second word: ropewalk ${group.join(', ropewalk ')} (see: ropewalk ${args[0]} --help)`,
    )
  }
  const names = [...commands.map(({ name }) => name), 'help']
  throw new UsageError(`there is no command ${quote(args[0])}${didYouMean(args[0]!, names)} (see: ropewalk help)`)
}

/**
 * Runs a command line. Returns the exit code: 0, 1 for a failure, 2 for a command line that cannot be understood, 128 + n
 * after a signal.
 */
export async function runCommand(args: readonly string[], streams: { stdout: Sink; stderr: Sink }): Promise<number> {
  const { stdout, stderr } = streams
  try {
    const [first] = args
    if (first === '--version' || first === '-v') {
      stdout.write(`${version}\n`)
      return 0
    }
    if (first === undefined || first === '--help' || first === '-h' || (first === 'help' && args.length === 1)) {
      stdout.write(`${overview()}\n`)
      return 0
    }
    const [word, ...more] = first === 'help' ? args.slice(1) : args
    const group = groupOf(word)
    if (group.length > 0 && (first === 'help' ? more.length === 0 : more[0] === '--help' || more[0] === '-h')) {
      stdout.write(`${groupHelp(word!, group)}\n`)
      return 0
    }
    const { command, rest } = find(first === 'help' ? args.slice(1) : args)
    const { operands, values } = parseOptions(command, first === 'help' ? ['--help'] : rest)
    const { help, json } = values as { help?: unknown; json?: unknown }
    if (help) {
      stdout.write(`${helpText(command)}\n`)
      return 0
    }
    return (await command.run({ operands, values }, new Output(stdout, stderr, json === true))) ?? 0
  } catch (error) {
    const { message, stack } = error instanceof Error ? error : new Error(String(error))
    stderr.write(`ropewalk: ${message.replace(/\s*\n\s*/g, ' ')}\n`)
    if (process.env.ROPEWALK_DEBUG === '1') stderr.write(`${stack}\n`)
    return error instanceof UsageError ? 2 : 1
  }
}
