import { copyFile, mkdir, readdir, readFile, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { RopewalkError } from '../errors.js'
import { replaceFolder, temporaryName, writeFileDurable } from '../files/durable.js'
import { readJsonObject, stringifyJson } from '../files/json.js'
import { Llama, type RopeExtension, type StepResult, Trainer, type TrainerOptions } from '../index.js'
import { listCheckpoints } from '../train/checkpoint.js'
import type { ReportFolder } from './folder.js'
import { type Extension, extensionOf, pointsOf, type Settings, timesText, windowOf } from './settings.js'
import type { Bench, Unit } from './units.js'

/**
 * How the window is stretched. `base` is the checkpoint as it is, read beyond its window; `direct` the same weights and
 * positions in a config that promises the larger window, which is what fine-tuning without interpolation begins with.
 */
export type Method = 'base' | 'pi' | 'direct' | 'ntk' | 'dynamic' | 'yarn'

export const METHODS: Record<Method, string> = {
  base: 'no change',
  pi: 'PI',
  direct: 'direct',
  ntk: 'NTK-aware',
  dynamic: 'dynamic NTK',
  yarn: 'YaRN',
}

const ROPE: Partial<Record<Method, RopeExtension['type']>> = {
  ...{ pi: 'linear', ntk: 'ntk', dynamic: 'dynamic', yarn: 'yarn' },
}

export interface ModelName {
  method: Method
  factor: number
  step: number
}

/** "pi-4@200": the method, the factor, and the steps of fine-tuning; the base is "base". */
export const idOf = ({ method, factor, step }: ModelName): string =>
  method === 'base' ? 'base' : `${method}-${factor}@${step}`

export function nameOf(id: string): ModelName {
  const [, method, factor, step] = /^(\w+?)(?:-([\d.]+)@(\d+))?$/.exec(id)!
  return { method: method as Method, factor: Number(factor ?? 1), step: Number(step ?? 0) }
}

/** What all units of a run share. */
export interface Plan {
  base: string
  window: number
  settings: Settings
  /** Paths by name of the data set. */
  data: Readonly<Record<string, readonly string[]>>
  device: string | undefined
  threads: number | undefined
  /** Of tokenised training data; undefined: the trainer's default. */
  cacheDir: string | undefined
}

/** Loads models of a report by id; those that were fine-tuned lie in its folder. */
export function loader({ base, settings, device, threads }: Plan, folder: ReportFolder) {
  const common = {
    dtype: settings.dtype,
    ...(device === undefined ? {} : { device }),
    ...(threads === undefined ? {} : { threads }),
  }
  return async (id: string): Promise<Llama> => {
    const path = folder.modelPath(id)
    if (await isFolder(path)) return Llama.load(path, common)
    const { method, factor, step } = nameOf(id)
    if (step > 0 || !Object.hasOwn(METHODS, method)) {
      throw new RopewalkError(
        'ERR_NOT_FOUND',
        `${path}: the fine-tuned model is gone, but what was measured of it is not: give --force to begin anew`,
      )
    }
    if (method === 'base') return Llama.load(base, common)
    if (method !== 'direct') return Llama.load(base, { ...common, rope: { type: ROPE[method]!, factor } })
    await promiseWindow(base, path, factor)
    return Llama.load(path, common)
  }
}

const isFolder = (path: string): Promise<boolean> =>
  stat(path).then(
    (info) => info.isDirectory(),
    () => false,
  )

/** Copies a model's folder; its config.json names a window that is `factor` times as large, and changes nothing else. */
async function promiseWindow(base: string, target: string, factor: number): Promise<void> {
  const work = temporaryName(target)
  try {
    await mkdir(work, { recursive: true })
    for (const entry of await readdir(base, { withFileTypes: true })) {
      if (entry.name !== 'config.json' && entry.isFile()) {
        await copyFile(join(base, entry.name), join(work, entry.name))
      }
    }
    const config = await readJsonObject(join(base, 'config.json'), { maxBytes: 16 << 20, python: true })
    const window = config.max_position_embeddings as number
    config.max_position_embeddings = windowOf(window, factor)
    config.original_max_position_embeddings ??= window
    await writeFileDurable(join(work, 'config.json'), stringifyJson(config))
    await replaceFolder(work, target, { overwrite: true })
  } finally {
    await rm(work, { recursive: true, force: true })
  }
}

/** What fine-tuning gave. */
export interface TrainingResult {
  method: Method | 'summary'
  factor: number
  context: number
  steps: number
  tokens: number
  /** Mean loss of each fiftieth of the steps. */
  curve: { step: number; loss: number }[]
  skipped: number
}

export const trainKey = (method: Method, factor: number): string => `train/${method}-${factor}`

/** Key of the training that makes a model; undefined for one that is not fine-tuned. */
export function madeBy(id: string): string[] {
  const { method, factor, step } = nameOf(id)
  return step > 0 ? [trainKey(method, factor)] : []
}

/** Work of training in tokens of a forward pass; attention grows with the window. */
export const trainingWork = ({ steps, batchSize, accumulate }: Extension, context: number, window: number): number =>
  3 * forwardWork(steps * batchSize * accumulate * context, context, window)

/** Tokens, dearer in longer rows. */
export const forwardWork = (tokens: number, context: number, window: number): number =>
  tokens * (1 + context / (8 * window))

/** The unit that fine-tunes by one method and factor, and leaves a model at each of the report's points. */
export function trainUnit(plan: Plan, method: Method, factor: number): Unit {
  const { settings, window } = plan
  const extension = extensionOf(settings, factor)
  const context = windowOf(window, factor)
  return {
    key: trainKey(method, factor),
    label: `fine-tuning ${METHODS[method]} ${timesText(factor)}`,
    work: trainingWork(extension, context, window),
    run: (bench) => fineTune(plan, method, factor, bench),
  }
}

function fineTune(plan: Plan, method: Method, factor: number, bench: Bench) {
  const { settings, window, data, cacheDir } = plan
  const extension = extensionOf(settings, factor)
  const { steps, batchSize, accumulate } = extension
  const context = windowOf(window, factor)
  const files = data[`train-${factor}`] ?? data.train
  if (!files) throw new RopewalkError('ERR_NO_TEXT', 'there are no texts to fine-tune on: give --data train=<folder>')
  const { learningRate, warmupSteps, schedule, finalFraction, maxGradNorm, seed } = settings
  const points = pointsOf(extension, settings.points).slice(1)
  return train(bench, {
    ...{ method, factor, from: idOf({ method, factor, step: 0 }) },
    targets: new Map(points.map((step) => [step, idOf({ method, factor, step })])),
    options: {
      data: files,
      ...{ context, steps, batchSize, accumulate, learningRate, schedule, finalFraction, maxGradNorm, seed },
      warmupSteps: Math.min(warmupSteps, steps),
      // The miniature's documents fill windows exactly; nothing may come between them.
      ...(data[`train-${factor}`] ? { appendEos: false } : {}),
      ...(cacheDir === undefined ? {} : { cacheDir }),
      saveEvery: Math.max(1, Math.ceil(steps / (2 * settings.points))),
    },
  })
}

/** A fine-tuning: of which model, how, and which models it leaves after which steps. */
export interface Training {
  method: Method | 'summary'
  factor: number
  from: string
  targets: ReadonlyMap<number, string>
  options: TrainerOptions & { steps: number; context: number }
}

/** Fine-tunes from where it was stopped, if it was. The models that it leaves are those of the trainer's own checkpoints. */
export async function train(bench: Bench, { method, factor, from, targets, options }: Training) {
  const { folder, signal } = bench
  const { steps, context } = options
  const output = `${folder.modelPath(`${method}-${factor}`)}.checkpoints`
  await publish(folder, output, targets)
  using model = await bench.load(from)
  using trainer = new Trainer(model, { ...options, output, resume: true, memory: 'auto' })
  for await (const { step, loss } of trainer.run(signal ? { signal } : {})) {
    bench.progress(step / steps, `step ${step} of ${steps}, loss ${loss.toFixed(3)}`)
    if (targets.has(step)) {
      await trainer.save()
      await publish(folder, output, targets)
    }
  }
  signal?.throwIfAborted()
  const results = await readMetrics(join(output, 'metrics.jsonl'))
  const value: TrainingResult = {
    ...{ method, factor, context, steps },
    tokens: results.reduce((sum, { tokens }) => sum + tokens, 0),
    curve: curveOf(results),
    skipped: results.filter(({ skipped }) => skipped).length,
  }
  return { value, time: { tokensPerSecond: median(results.map(({ tokensPerSecond }) => tokensPerSecond)) } }
}

/** Makes the models that have a checkpoint and are not there yet: also after a crash between the two. */
async function publish(folder: ReportFolder, output: string, targets: ReadonlyMap<number, string>): Promise<void> {
  for (const { step, path } of await listCheckpoints(output)) {
    const id = targets.get(step)
    if (id === undefined || (await isFolder(folder.modelPath(id)))) continue
    using saved = await Llama.load(path, { device: 'cpu' })
    await saved.save(folder.modelPath(id))
  }
}

/** Removes the checkpoints of trainings that are done: their models stay. */
export async function removeCheckpoints(folder: ReportFolder): Promise<void> {
  for (const name of await readdir(join(folder.path, 'models')).catch(() => [])) {
    const [, id] = /^(.+)\.checkpoints$/.exec(name) ?? []
    if (id !== undefined && folder.has(`train/${id}`))
      await rm(folder.modelPath(name), { recursive: true, force: true })
  }
}

async function readMetrics(path: string): Promise<StepResult[]> {
  const lines = (await readFile(path, 'utf8')).split('\n').filter((line) => line !== '')
  return lines.map((line) => JSON.parse(line) as StepResult)
}

const CURVE = 50

function curveOf(results: readonly StepResult[]): TrainingResult['curve'] {
  const size = Math.ceil(results.length / CURVE)
  const curve: TrainingResult['curve'] = []
  for (let start = 0; start < results.length; start += size) {
    const part = results.slice(start, start + size)
    curve.push({ step: part.at(-1)!.step, loss: part.reduce((sum, { loss }) => sum + loss, 0) / part.length })
  }
  return curve
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const middle = sorted.length >> 1
  return sorted.length % 2 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2
}
