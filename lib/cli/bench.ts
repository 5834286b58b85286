import { constants } from 'node:fs'
import { access, writeFile } from 'node:fs/promises'
import { dirname } from 'node:path'
import { stems } from '../bench/cases.js'
import { svg } from '../bench/chart.js'
import { caseTable, csv, factTable, profileTable, type Table } from '../bench/report.js'
import { type Report, runBench } from '../bench/run.js'
import { didYouMean, formatBytes, quote, RopewalkError } from '../errors.js'
import { type Command, commonOptions, defined, UsageError } from './options.js'
import type { Output, Progress } from './output.js'

const options = {
  quick: { kind: 'flag', help: 'small sizes and few runs: shows that it works, not how fast it is' },
  time: { kind: 'number', value: 's', min: 0, help: 'seconds to measure each side of a case', default: '1, quick 0.1' },
  threads: { kind: 'numbers', value: 'n,...', min: 1, help: 'numbers of CPU threads', default: '1 and one a core' },
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
  out: { kind: 'text', value: 'file', help: 'write everything as JSON' },
  csv: { kind: 'text', value: 'file', help: 'write the cases as CSV' },
  svg: { kind: 'text', value: 'file', help: 'write a bar chart' },
  ...commonOptions,
} as const

export const bench: Command<typeof options> = {
  name: 'bench',
  summary: 'Measures kernels, training steps, loading and generating beside peers and what the machine can do.',
  details:
    'ropewalk bench [stem] measures one part only. Stems:\n' +
    `${stems.join(', ')}\n\n` +
    'Every side of a case runs in turn, so that other work on the machine meets all alike; given are medians, and\n' +
    'ratios within rounds. Peers are used where they are: OpenBLAS (ROPEWALK_OPENBLAS names its file), PyTorch and\n' +
    'transformers (of the Python that ROPEWALK_PYTHON names, else python3).',
  examples: ['ropewalk bench --quick', 'ropewalk bench matmul --threads 1,2 --svg matmul.svg'],
  operands: ['stem?'],
  options,
  async run({ operands: [name], values }, output) {
    const { quick, threads, profile } = values
    const stem = stems.find((known) => known === name)
    if (name !== undefined && !stem) {
      throw new UsageError(`there is no stem ${quote(name)}${didYouMean(name, stems)}; known are ${stems.join(', ')}`)
    }
    const files = defined({ out: values.out, csv: values.csv, svg: values.svg })
    for (const path of Object.values(files)) await requireFolder(path)
    const interrupt = listen(output)
    let progress: Progress | undefined
    let report: Report
    try {
      report = await runBench({
        ...defined({ stem, threads: threads && [...new Set(threads)] }),
        ...{ quick, profile, peers: !values['no-peers'], signal: interrupt.signal },
        seconds: values.time ?? (quick ? 0.1 : 1),
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
    const contents = {
      out: () => `${JSON.stringify(report, null, 1)}\n`,
      csv: () => csv(report),
      svg: () => svg(report),
    }
    for (const [kind, path] of Object.entries(files)) await writeFile(path, contents[kind as keyof typeof contents]())
    output.value(report)
  },
}

function show({ machine, cases, facts, profiles }: Report, output: Output): void {
  const { cpu, cores, isa, memoryBytes, node, loadBefore, loadAfter } = machine
  output.line(`${cpu}, ${cores} cores, ${isa}, ${formatBytes(memoryBytes).replace(/.*\((.*)\)/, '$1')}, Node ${node}`)
  output.line(`load of the machine ${loadBefore} before, ${loadAfter} after`)
  const table = ({ head, rows }: Table): void => {
    if (rows.length === 0) return
    output.line()
    output.table(head, rows)
  }
  table(caseTable(cases))
  table(factTable(facts))
  for (const profile of profiles) table(profileTable(profile))
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
