import { readFile, stat } from 'node:fs/promises'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { trainBase } from '../demo/base.js'
import { Dice } from '../demo/data.js'
import { BASE } from '../demo/demo.js'
import { writeFileDurable } from '../files/durable.js'
import { loadTokenizer } from '../files/tokenizer.js'
import { Llama, perplexity, readTokenDocuments } from '../index.js'
import { page } from '../report/page.js'
import { escapeXml, lineChart, STYLES } from '../report/plot.js'
import { lengthAxis, logAxis } from './charts.js'
import type { ReportFolder } from './folder.js'
import { miniatureData, PEOPLE } from './mini/data.js'
import { miniatureSettings } from './mini/settings.js'
import { Writer } from './mini/texts.js'
import { plainTable } from './page.js'
import { finalId, passkeyOf, perplexityOf } from './results.js'
import { reproduce } from './run.js'
import { cell, csvOf, figure, label, percent, perplexityText, type Table } from './sections.js'
import { type Settings, timesText } from './settings.js'

/**
 * Where the paper's contrasts set in: models of several sizes and head dimensions, trained from nothing for two lengths of
 * time, and the demo's own model, which was trained for longer; each stretched 4x with and without interpolation in the
 * same few steps.
 */

interface Variant {
  name: string
  /** What differs from the demo's model. */
  shape: Readonly<Record<string, number>>
  /** The demo's model itself, which comes with the package, is this one trained to the end. */
  shipped?: true
}

const shape = (hidden: number, layers: number, heads: number): Variant['shape'] => ({
  ...{ hidden_size: hidden, intermediate_size: Math.round((hidden * 2.75) / 8) * 8, num_hidden_layers: layers },
  ...{ num_attention_heads: heads, num_key_value_heads: heads },
})

const VARIANTS: readonly Variant[] = [
  { name: '2 layers, 2 heads of 32', shape: shape(64, 2, 2) },
  { name: '4 layers, 4 heads of 32', shape: shape(128, 4, 4) },
  { name: '4 layers, 2 heads of 64', shape: shape(128, 4, 2), shipped: true },
  { name: '6 layers, 3 heads of 64', shape: shape(192, 6, 3) },
]

/** Fractions of the demo's training, which has 14.8M tokens. */
const LENGTHS = [0.15, 0.45]
const FACTOR = 4
/** Further windows, at which the base is read unchanged: where extrapolation breaks down at all. */
const FARTHER = [8, 16] as const
/** Steps of a window each, after which the two fine-tunings are compared. */
const STEPS = 400
const EXPERIMENTS = ['table-1', 'table-3', 'table-4'] as const

export interface StudyOptions {
  out: string
  seed?: number
  /** For tests: a fraction of all steps. */
  scale?: number
  variants?: number
  signal?: AbortSignal | undefined
  onProgress?: ((done: number, task: string) => void) | undefined
}

/** What the study tells of one trained model. */
export interface StudyRow {
  variant: string
  headDim: number
  parameters: number
  trainedTokens: number
  /** Perplexity at the original window, and of the base at the extended one. */
  near: number
  extrapolated: number
  /** extrapolated / near: above 1 where the base breaks down. */
  blowUp: number
  /** The same at 8 and 16 times the window, on longer texts. */
  farther: { factor: number; blowUp: number }[]
  /** At the extended window: PI before any step, and both fine-tunings after the same steps. */
  interpolated: number
  pi: number
  direct: number
  piKeys: number
  directKeys: number
}

function studySettings(window: number, seed: number, scale: number): Settings {
  const settings = miniatureSettings(window, seed)
  const steps = Math.max(2, Math.round(STEPS * scale))
  return {
    ...settings,
    extensions: [{ factor: FACTOR, steps, batchSize: 1, accumulate: 1 }],
    direct: [FACTOR],
    compared: FACTOR,
    comparedTuned: [],
    points: 1,
    documents: scale < 1 ? 1 : 16,
    passkey: scale < 1 ? { distances: 2, trials: 1 } : { distances: 8, trials: 5 },
  }
}

/** Trains what is not trained yet, measures what is not measured yet, and writes study.json, study.csv and index.html. */
export async function study(options: StudyOptions): Promise<StudyRow[]> {
  const { out, seed = 1, scale = 1, signal, onProgress } = options
  const models = VARIANTS.slice(0, options.variants).flatMap((variant) =>
    [...LENGTHS, ...(variant.shipped ? [1] : [])].map((length) => ({ variant, length })),
  )
  const rows: StudyRow[] = []
  const cores = availableParallelism()
  for (const [n, { variant, length }] of models.entries()) {
    const folder = join(out, `${variant.name.replaceAll(/[^a-z0-9]+/g, '-')}-${length}`)
    const base = length === 1 ? BASE : join(folder, 'base')
    const progress = (part: number, task: string): void =>
      onProgress?.((n + part) / models.length, `${variant.name}, ${length} of the training: ${task}`)
    const total = 14.8e6 * length * scale
    progress(0, 'training')
    if (!(await stat(base).catch(() => undefined))) {
      await trainBase(base, {
        ...{ shape: variant.shape, scale: length * scale },
        ...(signal ? { signal } : {}),
        onPoint: ({ tokens }) => progress(Math.min(0.7, (0.7 * tokens) / total), 'training'),
      })
    }
    const settings = studySettings(256, seed, scale)
    const report = join(folder, 'report')
    const { folder: result } = await reproduce({
      kind: 'miniature',
      ...{ base, out: report, settings, only: EXPERIMENTS, device: 'cpu' },
      generate: () => miniatureData(join(report, 'data'), base, 256, settings),
      ...{ lanes: Math.min(2, cores), threads: Math.max(1, Math.floor(cores / 2)) },
      ...{ signal, onProgress: (done, task) => progress(0.7 + 0.3 * done, task) },
    })
    const trained = JSON.parse(await readFile(join(base, 'training.json'), 'utf8')) as { tokens: number }
    const farther = await fartherOf(base, folder, seed, scale, signal)
    rows.push({ ...rowOf(variant, trained.tokens, result), farther })
  }
  const table = tableOf(rows)
  const json = { seed, factor: FACTOR, steps: Math.max(2, Math.round(STEPS * scale)), rows }
  await writeFileDurable(join(out, 'study.json'), `${JSON.stringify(json, null, 2)}\n`)
  await writeFileDurable(join(out, 'study.csv'), csvOf(table))
  await writeFileDurable(join(out, 'index.html'), studyPage(json, table))
  onProgress?.(1, 'done')
  return rows
}

/** The base's perplexity in ever longer windows by that in its own, on the same texts; kept in a file of the folder. */
async function fartherOf(
  base: string,
  folder: string,
  seed: number,
  scale: number,
  signal: AbortSignal | undefined,
): Promise<StudyRow['farther']> {
  const [path, texts] = ['farther.json', 'farther.jsonl'].map((name) => join(folder, name)) as [string, string]
  const there = await readFile(path, 'utf8').catch(() => undefined)
  if (there) return JSON.parse(there) as StudyRow['farther']
  using model = await Llama.load(base, { device: 'cpu', dtype: 'float32' })
  const window = model.contextWindow
  const writer = new Writer(await loadTokenizer(base))
  const dice = new Dice(10_000 * seed + 900)
  const rows = Array.from({ length: scale < 1 ? 1 : 4 }, () => ({
    text: writer.prose(dice, PEOPLE.pg19, window * Math.max(...FARTHER)),
  }))
  await writeFileDurable(texts, rows.map((row) => `${JSON.stringify(row)}\n`).join(''))
  const [near, ...far] = await perplexity(model, await readTokenDocuments(model, [texts]), {
    ...{ windows: [1, ...FARTHER].map((factor) => factor * window), stride: window / 2 },
    ...(signal ? { signal } : {}),
  })
  const farther = FARTHER.map((factor, i) => ({ factor, blowUp: far[i]!.perplexity / near!.perplexity }))
  await writeFileDurable(path, `${JSON.stringify(farther, null, 2)}\n`)
  return farther
}

function rowOf({ name, shape }: Variant, trainedTokens: number, folder: ReportFolder): Omit<StudyRow, 'farther'> {
  const { settings, model } = folder.record
  const far = model.window * FACTOR
  const at = (id: string, window: number): number => perplexityOf(folder, 'pg19', id, window)!.perplexity
  const [pi, direct] = (['pi', 'direct'] as const).map((method) => finalId(settings, method, FACTOR)) as [
    string,
    string,
  ]
  const [near, extrapolated] = [at('base', model.window), at('base', far)]
  return {
    ...{ variant: name, headDim: shape.hidden_size! / shape.num_attention_heads!, parameters: model.parameters },
    ...{ trainedTokens, near, extrapolated, blowUp: extrapolated / near },
    ...{ interpolated: at(`pi-${FACTOR}@0`, far), pi: at(pi, far), direct: at(direct, far) },
    ...{ piKeys: passkeyOf(folder, pi, far)!.accuracy, directKeys: passkeyOf(folder, direct, far)!.accuracy },
  }
}

const FARTHEST = Math.max(...FARTHER)
const farthest = ({ farther }: StudyRow): number => farther.find(({ factor }) => factor === FARTHEST)!.blowUp

const tableOf = (rows: readonly StudyRow[]): Table => ({
  id: 'study',
  caption: `Perplexity at the original window, and at ${FACTOR} times it`,
  head: [
    ...['model', 'weights', 'trained on', 'original', 'far, no change', 'far / original'],
    ...FARTHER.map((factor) => `the same at ${timesText(factor)}`),
    'PI, no tuning',
    ...['PI tuned', 'direct tuned', 'PI / direct', 'keys, PI', 'keys, direct'],
  ],
  rows: rows.map((row) => [
    label(row.variant),
    cell(row.parameters),
    figure(row.trainedTokens, (tokens) => `${(tokens / 1e6).toFixed(1)}M`),
    ...[row.near, row.extrapolated].map((value) => figure(value, perplexityText)),
    ...[row, ...row.farther].map(({ blowUp }) => figure(blowUp, (value) => value.toFixed(3))),
    ...[row.interpolated, row.pi, row.direct].map((value) => figure(value, perplexityText)),
    figure(row.pi / row.direct, (value) => value.toFixed(3)),
    ...[row.piKeys, row.directKeys].map((value) => figure(value, percent)),
  ]),
})

function studyPage({ seed, steps, rows }: { seed: number; steps: number; rows: StudyRow[] }, table: Table): string {
  const groups = [...new Set(rows.map(({ headDim, trainedTokens }) => `${headDim} ${trainedTokens}`))]
  const chart = (title: string, name: string, value: (row: StudyRow) => number): string => {
    const lines = groups.map((group, i) => {
      const own = rows.filter((row) => `${row.headDim} ${row.trainedTokens}` === group)
      return {
        ...STYLES[i % STYLES.length]!,
        name: `heads of ${own[0]!.headDim}, ${(own[0]!.trainedTokens / 1e6).toFixed(1)}M tokens`,
        points: own.map((row) => [row.parameters, value(row)] as const),
      }
    })
    const x = {
      ...lengthAxis(
        'weights, log scale',
        rows.map(({ parameters }) => parameters),
      ),
      format: (n: number) => `${(n / 1e6).toFixed(1)}M`,
    }
    return lineChart({
      title,
      x,
      y: logAxis(name, rows.map(value)),
      lines,
      marks: [{ y: 1, text: 'no difference' }],
      legend: true,
    })
  }
  const title = 'Where the paper’s contrasts set in'
  const body = [
    `<h1>${title}</h1>`,
    `<p>Models trained from nothing at 256 tokens on the miniature’s texts (the longest training is that of the demo’s model), then read at ${256 * FACTOR}: unchanged; with positions ` +
      `divided by ${FACTOR}; and fine-tuned for ${steps} steps of one window, with and without that. Above 1, the first chart shows a base that ` +
      'breaks down beyond its window; below 1, the second shows interpolation ahead. Seed ' +
      `${seed}.</p>`,
    `<p>${escapeXml(verdict(rows))}</p>`,
    `<figure><div class="charts">${[
      chart(`Extrapolation: perplexity at ${timesText(FARTHEST)} / original`, 'ratio', farthest),
      chart('After the same steps: PI / direct', 'ratio', ({ pi, direct }) => pi / direct),
    ].join('')}</div></figure>`,
    plainTable(table),
  ]
  return page({ title, body: body.join('\n') })
}

/** What the figures show, computed from them. */
export function verdict(rows: readonly StudyRow[]): string {
  const at = (name: string, blowUp: (row: StudyRow) => number): string => {
    const ratios = rows.map(blowUp)
    const above = (limit: number): number => ratios.filter((ratio) => ratio > limit).length
    return (
      `${name}, ${above(1.1)} have a perplexity more than 10 % above that of their own window, and ${above(10)} one of more than ` +
      `ten times it (the largest ratio is ${Math.max(...ratios).toFixed(2)})`
    )
  }
  const ahead = rows.filter(({ pi, direct }) => pi < direct)
  // of one shape, in the order of their training
  const pairs = rows.flatMap((row, i) => {
    const next = rows[i + 1]
    return next && next.variant === row.variant
      ? [{ ratio: farthest(next) > farthest(row), pi: next.pi / next.direct > row.pi / row.direct }]
      : []
  })
  const count = (of: 'ratio' | 'pi'): number => pairs.filter((pair) => pair[of]).length
  return (
    `Of ${rows.length} models that read on unchanged, ${at(`at ${timesText(FACTOR)}`, ({ blowUp }) => blowUp)}; ` +
    `${at(`at ${timesText(FARTHEST)}`, farthest)}. In ${ahead.length} PI has the lower perplexity after the same steps. ` +
    `Longer training of one shape raises the ratio at ${timesText(FARTHEST)} in ${count('ratio')} of ${pairs.length} steps, ` +
    `and that of PI to direct fine-tuning in ${count('pi')}.`
  )
}
