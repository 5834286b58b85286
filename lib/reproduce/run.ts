import { availableParallelism, cpus } from 'node:os'
import { basename, resolve } from 'node:path'
import { didYouMean, quote, RopewalkError } from '../errors.js'
import { Llama, version } from '../index.js'
import { checkData } from './check.js'
import { DATA_SETS, experimentsOf, missingData } from './experiments.js'
import { describeData, modelHash, ReportFolder, type ReportRecord } from './folder.js'
import { loader, type Plan, removeCheckpoints } from './models.js'
import { claimsTable, reportPage, sectionsOf, settingsTable } from './page.js'
import { csvOf, type Section } from './sections.js'
import type { Settings } from './settings.js'
import { runUnits } from './units.js'

export interface ReproduceOptions {
  kind: ReportRecord['kind']
  /** Folder of the model that is extended. */
  base: string
  out: string
  settings: Settings
  /** Paths by name of the data set. */
  data?: Readonly<Record<string, readonly string[]>>
  /** Writes data sets into the report's folder, where they are the report's own. */
  generate?: () => Promise<{ data: Record<string, readonly string[]>; cacheDir: string }>
  /** Ids of experiments; default: all. */
  only?: readonly string[] | undefined
  force?: boolean
  device?: string | undefined
  /** Threads of each lane. */
  threads?: number | undefined
  /** Pieces of work side by side; default 1. */
  lanes?: number
  signal?: AbortSignal | undefined
  onProgress?: ((done: number, task: string) => void) | undefined
}

export interface ReproduceResult {
  folder: ReportFolder
  sections: Section[]
  notRun: { title: string; why: string }[]
}

/**
 * Runs the experiments that the data allow, and writes the report. What is done already is not done again; an abort
 * leaves a folder to go on from, with a page of what there is.
 */
export async function reproduce(options: ReproduceOptions): Promise<ReproduceResult> {
  const { kind, base, out, settings, only, device, threads, lanes = 1, signal, onProgress } = options
  const experiments = experimentsOf(only)
  checkDataNames(options.data ?? {})
  const common = { dtype: settings.dtype, ...(threads === undefined ? {} : { threads }) }
  const dry = await Llama.load(base, { ...common, device: 'dry' })
  const { contextWindow: window, parameterCount: parameters } = dry
  dry.dispose()
  const name = kind === 'miniature' ? 'The miniature' : basename(resolve(base))
  const model = { name, hash: await modelHash(base), window, parameters }
  if (options.data) {
    const runnable = experiments.filter((experiment) => missingData(experiment, options.data!) === undefined)
    const names = new Set(runnable.flatMap(({ data, someOf = [] }) => [...data, ...someOf]))
    await checkData(options.data, names, signal, (task) => onProgress?.(0, task))
  }
  const record: ReportRecord = { kind, model, settings, data: await describe(options.data ?? {}) }
  const folder = await ReportFolder.open(out, record, { force: options.force ?? false })
  const generated = await options.generate?.()
  if (generated) await folder.setData(await describe(generated.data))
  const data = generated?.data ?? options.data ?? {}
  const plan: Plan = { base, window, settings, data, device, threads, cacheDir: generated?.cacheDir }
  const units = experiments.flatMap((experiment) =>
    missingData(experiment, data) === undefined ? experiment.units(plan) : [],
  )
  // Trainings first: they are the longest, and much waits for them.
  units.sort((a, b) => Number(b.key.startsWith('train/')) - Number(a.key.startsWith('train/')))
  if (units.some(({ key }) => !folder.has(key))) await beginSession(folder, base, common, device)
  try {
    await runUnits(units, { folder, lanes, load: loader(plan, folder), signal, onProgress })
  } finally {
    await removeCheckpoints(folder)
    await writePages(folder)
  }
  return { folder, ...sectionsOf(folder) }
}

function checkDataNames(data: Readonly<Record<string, unknown>>): void {
  const known = Object.keys(DATA_SETS)
  for (const name of Object.keys(data)) {
    if (known.includes(name)) continue
    throw new RangeError(`there is no data set ${quote(name)}${didYouMean(name, known)}; there are ${known.join(', ')}`)
  }
}

async function describe(data: Readonly<Record<string, readonly string[]>>): Promise<ReportRecord['data']> {
  const given: ReportRecord['data'] = {}
  for (const [name, paths] of Object.entries(data)) given[name] = await describeData(paths)
  return given
}

async function beginSession(
  folder: ReportFolder,
  base: string,
  common: { dtype: Settings['dtype']; threads?: number },
  device: string | undefined,
): Promise<void> {
  using model = await Llama.load(base, { ...common, ...(device === undefined ? {} : { device }) })
  await folder.begin({
    date: new Date().toISOString(),
    version,
    node: process.versions.node,
    machine: `${cpus()[0]?.model.trim() ?? 'unknown CPU'}, ${availableParallelism()} cores`,
    device: model.device.description,
  })
}

/** Makes the page and the CSV files from the units. */
export async function writePages(folder: ReportFolder): Promise<void> {
  const { sections } = sectionsOf(folder)
  const claims = claimsTable(folder)
  for (const table of [
    ...(claims ? [claims] : []),
    ...sections.flatMap(({ tables }) => tables),
    settingsTable(folder),
  ]) {
    await folder.write(`csv/${table.id}.csv`, csvOf(table))
  }
  await folder.write('index.html', reportPage(folder))
}

/** Reports of several seeds must be of one model and one set of settings, the seed aside. */
export function requireAlike(folders: readonly ReportFolder[]): void {
  const without = ({ record }: ReportFolder): string =>
    JSON.stringify({ ...record, settings: { ...record.settings, seed: 0 }, data: undefined })
  const first = folders[0]!
  for (const other of folders.slice(1)) {
    if (without(other) !== without(first)) {
      throw new RopewalkError(
        'ERR_FORMAT',
        `${other.path}: is of another model or other settings than ${first.path}: reports that are combined differ in the seed alone`,
      )
    }
    if (other.record.settings.seed === first.record.settings.seed) {
      throw new RopewalkError(
        'ERR_FORMAT',
        `${other.path}: has the seed of ${first.path}: give reports of different seeds`,
      )
    }
  }
}
