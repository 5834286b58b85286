import { readConfig as readFolderConfig, realFolder } from '../files/folder.js'
import { writeFileDurable } from '../files/durable.js'
import { theory as compute, version } from '../index.js'
import { type LlamaConfig, readConfig } from '../model/config.js'
import { theoryPage } from '../report/theory.js'
import { type Command, commonOptions, defined } from './options.js'

const whole = { kind: 'number', value: 'n', whole: true } as const

const options = {
  out: { kind: 'text', value: 'file.html', help: 'also write a page with all figures' },
  'head-dim': { ...whole, min: 2, max: 1024, help: 'd, dimension of a head', default: "the model's, or 128" },
  theta: { kind: 'number', value: 'c', help: 'c, base of the frequencies', default: "the model's, or 10000" },
  window: { ...whole, min: 2, help: 'L, the trained window in tokens', default: "the model's, or 2048" },
  context: {
    ...{ ...whole, min: 3, help: "L', the extended window" },
    default: "the model's where it is extended, or 16 L",
  },
  seed: { ...whole, min: 0, help: 'of random targets and coefficients', default: '0' },
  ...commonOptions,
} as const

export const theory: Command<typeof options> = {
  name: 'theory',
  summary: "Recomputes the paper's theorem and its Figures 2 and 5, for any head: what holds, and what does not.",
  details:
    'Without a model: the dimensions of the paper. With a model folder: those of its config.json (no weights are read); the\n' +
    'frequencies are those before any scaling. --json gives every series of every figure.',
  examples: [
    'ropewalk theory --out theory.html',
    'ropewalk theory ./llama-8k --out theory.html',
    'ropewalk theory --head-dim 64 --theta 500000 --window 8192 --context 131072 --json',
  ],
  operands: ['model?'],
  options,
  async run({ operands: [path], values }, output) {
    const config = path === undefined ? undefined : await configOf(path)
    const { out, seed } = values
    const headDim = values['head-dim'] ?? config?.headDim
    const theta = values.theta ?? config?.rope.theta
    const window = values.window ?? config?.originalMaxPositionEmbeddings
    const extended = config && extendedWindow(config, window!)
    const context = values.context ?? extended
    const progress = output.progress('theory', 100)
    let result: ReturnType<typeof compute>
    try {
      const onProgress = (part: number): void => progress.update(Math.round(100 * part), '%')
      result = compute({ ...defined({ headDim, theta, window, context, seed }), onProgress })
    } finally {
      progress.end()
    }
    if (out !== undefined) {
      await writeFileDurable(out, theoryPage(result, { version, ...(path !== undefined && { about: path }) }))
    }
    output.line(
      `d = ${result.headDim}, c = ${result.theta}, L = ${result.window}, L' = ${result.context}: a(s) = Re sum h_j exp(i s theta_j)`,
    )
    for (const { claim, holds, figures } of result.statements) {
      output.line(`\n${holds ? '[holds]' : '[fails]'} ${claim}`)
      output.line(`        ${figures}`)
    }
    if (out !== undefined) output.line(`\nfigures: ${out}`)
    output.value({ ...(path !== undefined && { model: path }), ...result, out })
  },
}

/** The config alone: the folder need not hold weights. */
async function configOf(path: string): Promise<LlamaConfig> {
  return readConfig(await readFolderConfig(path, await realFolder(path), 'config.json'), `${path}/config.json`)
}

/** L' of a model: its window where that is beyond L, or the factor says it; undefined where it is not extended. */
function extendedWindow({ maxPositionEmbeddings, rope }: LlamaConfig, window: number): number | undefined {
  const length = Math.max(maxPositionEmbeddings, Math.floor(window * (rope.factor ?? 1)))
  return length > window ? length : undefined
}
