import { constants } from 'node:fs'
import { access, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { type Stem, stems } from '../bench/case.js'
import { svg } from '../bench/chart.js'
import { caseTable, csv, factTable, machineLine, profileTable, type Table } from '../bench/report.js'
import { type Report, runBench } from '../bench/run.js'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { type Command, commonOptions, defined, UsageError } from './options.js'
import type { Output, Progress } from './output.js'

const options = {
  device: { kind: 'text', value: 'name', help: 'what to measure: auto, cpu, cuda, cuda:1, simt', default: 'auto' },
  quick: { kind: 'flag', help: 'small sizes and few runs: shows that it works, not how fast it is' },
  time: { kind: 'number', value: 's', min: 0, help: 'seconds to measure each side of a case', default: '1, quick 0.1' },
  limit: { kind: 'number', value: 's', min: 0, help: 'seconds after which no case is begun', default: 'none' },
  threads: {
    kind: 'numbers',
    value: 'n,...',
    min: 1,
    help: 'numbers of CPU threads, for the device cpu',
    default: '1 and one a core',
  },
  'no-peers': { kind: 'flag', help: 'without OpenBLAS, PyTorch and transformers' },
  'load-mb': {
    kind: 'number',
    value: 'n',
    min: 1,
    max: 100_000,
    whole: true,
    help: 'size of the file of load',
    default: '1000, quick 8',
  },
  profile: { kind: 'flag', help: 'also the time of each operation of the training step' },
  long: { kind: 'flag', help: 'also a step of 32,768 tokens that saves memory in every way, on the CPU: 10 minutes' },
  out: { kind: 'text', value: 'file', help: 'write everything as JSON' },
  csv: { kind: 'text', value: 'file', help: 'write the cases as CSV' },
  svg: { kind: 'text', value: 'file', help: 'write a bar chart' },
  ...commonOptions,
} as const

export const bench: Command<typeof options> = {
  name: 'bench',
  summary: 'Measures kernels, training steps, loading and generating beside peers and what the machine can do.',
  details:
    'ropewalk bench [stem] measures one part only, ropewalk bench matmul,adamw two. Stems:\n' +
    `${stems.slice(0, 8).join(', ')},\n${stems.slice(8).join(', ')}\n\n` +
    'Every side of a case runs in turn, so that other work on the machine meets all alike; given are medians, and\n' +
    'ratios within rounds. Operations are timed by the host, many in one plan. Peers are used where they are: PyTorch\n' +
    'and transformers (of the Python that ROPEWALK_PYTHON names, else python3), on the CPU also OpenBLAS\n' +
    '(ROPEWALK_OPENBLAS names its file), on a GPU cuBLASLt (ROPEWALK_CUBLASLT names its file) and, through PyTorch,\n' +
    'cuBLAS, FlashAttention and cuDNN. There the weights are bf16, and the roofline is the matrix product of cuBLASLt and\n' +
    'the copy of PyTorch, else our own.\n' +
    'The device simt executes the CUDA kernels on the CPU, for tests; with --quick only.',
  examples: [
    'ropewalk bench --quick',
    'ropewalk bench matmul --threads 1,2 --svg matmul.svg',
    'ropewalk bench attention,rope --device cuda --out attention.json',
  ],
  operands: ['stem?'],
  options,
  async run({ operands: [names], values }, output) {
    const { quick, threads, profile, long, device = threads ? 'cpu' : 'auto' } = values
    const stems = names === undefined ? undefined : readStems(names)
    if (device === 'simt' && !quick) {
      throw new UsageError('--device simt executes kernels on the CPU, for tests: it needs --quick')
    }
    if (threads && device !== 'cpu') throw new UsageError(`--threads counts CPU threads: leave out --device ${device}`)
    const files = defined({ out: values.out, csv: values.csv, svg: values.svg })
    for (const path of Object.values(files)) await requireFolder(path)
    const contents = {
      out: (report: Report) => `${JSON.stringify(report, null, 1)}\n`,
      csv,
      svg,
    }
    const save = async (report: Report): Promise<void> => {
      for (const [kind, path] of Object.entries(files)) {
        await writeFile(path, contents[kind as keyof typeof contents](report))
      }
    }
    const interrupt = listen(output)
    let progress: Progress | undefined
    let report: Report
    try {
      report = await runBench({
        ...defined({ stems, threads: threads && [...new Set(threads)] }),
        ...{ device, quick, profile, long, peers: !values['no-peers'], signal: interrupt.signal, save },
        seconds: values.time ?? (quick ? 0.1 : 1),
        limit: values.limit ?? Infinity,
        loadBytes: (values['load-mb'] ?? (quick ? 8 : 1000)) * 1e6,
        note: (text) => output.note(text),
        progress(done, total, what) {
          progress ??= output.progress('bench', total, 'each')
          progress.update(done, what)
        },
      })
    } catch (error) {
      if (!interrupt.signal.aborted) throw error
      return interrupt.code
    } finally {
      progress?.end()
      interrupt.stop()
    }
    show(report, output)
    await save(report)
    output.value(report)
    return report.failures.length > 0 ? 1 : 0
  },
}

function readStems(names: string): Stem[] {
  return names.split(',').map((name) => {
    const stem = stems.find((known) => known === name)
    if (stem) return stem
    throw new UsageError(`there is no stem ${quote(name)}${didYouMean(name, stems)}; known are ${stems.join(', ')}`)
  })
}

function show({ machine, cases, facts, profiles, failures, left }: Report, output: Output): void {
  output.line(machineLine(machine))
  output.line(`load of the machine ${machine.loadBefore} before, ${machine.loadAfter} after`)
  const table = ({ head, rows }: Table): void => {
    if (rows.length === 0) return
    output.line()
    output.table(head, rows)
  }
  table(caseTable(cases))
  table(factTable(facts))
  for (const profile of profiles) table(profileTable(profile))
  for (const { name, error } of failures) output.line(`FAILED ${name}: ${error}`)
  if (left.length > 0) output.line(`not begun within --limit: ${left.join('; ')}`)
}

/** Before minutes of work: whether their result can be written. */
async function requireFolder(path: string): Promise<void> {
  try {
    await access(dirname(path), constants.W_OK)
  } catch {
    throw new RopewalkError('ERR_WRITE', `${path}: ${dirname(path)} is not a folder that can be written to`)
  }
}

/** SIGINT and SIGTERM end the run after the measurement in progress, with nothing left behind. */
function listen(output: Output): { signal: AbortSignal; readonly code: number; stop(): void } {
  const controller = new AbortController()
  let code = 1
  const handler = (name: 'SIGINT' | 'SIGTERM'): void => {
    code = name === 'SIGINT' ? 130 : 143
    output.note(`${name}: ending after this measurement`)
    controller.abort()
  }
  process.on('SIGINT', handler)
  process.on('SIGTERM', handler)
  return {
    signal: controller.signal,
    get code() {
      return code
    },
    stop() {
      process.off('SIGINT', handler)
      process.off('SIGTERM', handler)
    },
  }
}
