import { createHash } from 'node:crypto'
import { type FileHandle, mkdir, open, readdir, readFile, rm, stat } from 'node:fs/promises'
import { basename, dirname, join, relative } from 'node:path'
import { RopewalkError } from '../errors.js'
import { isTaken, sha256File, writeFailure, writeFileDurable } from '../files/durable.js'
import { openModelFolder } from '../files/folder.js'
import { isObject, parseJson } from '../files/json.js'
import { listCheckpoints } from '../train/checkpoint.js'
import { difference, type Settings } from './settings.js'

/**
 * A report's folder:
 *
 *   report.json       what decides the numbers: model, settings, data
 *   sessions.json     when, where and with which version work was done
 *   units/            a file for each finished piece of work; nothing else is in the tables
 *   times/            how long each took: not part of what repeats itself
 *   models/           fine-tuned models, by method, factor and step; checkpoints of the one at work
 *   csv/, index.html  made from the above, again after each run
 *
 * A unit is written whole, once, when it is done. So a run that was stopped goes on where it was, and two runs of one
 * seed have the same report.json and units, byte for byte.
 */
export interface ReportRecord {
  /** What is measured: 'paper' for a user's model, 'miniature' for the shipped one on generated data. */
  kind: 'paper' | 'miniature'
  model: { name: string; hash: string; window: number; parameters: number }
  settings: Settings
  /** Files of each data set, by name and size. */
  data: Record<string, { file: string; bytes: number }[]>
}

export interface Session {
  date: string
  version: string
  node: string
  machine: string
  device: string
}

/** All that a run writes; --force deletes nothing else. */
const OWN = ['report.json', 'sessions.json', 'units', 'times', 'models', 'data', 'csv', 'index.html']

/** Numbers of JavaScript's own: large ones were written from what they are read as. */
const OWN_JSON = { python: true }

const toJson = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`

export class ReportFolder {
  private readonly done = new Map<string, unknown>()
  readonly times = new Map<string, unknown>()
  sessions: Session[] = []

  private constructor(
    readonly path: string,
    public record: ReportRecord,
  ) {}

  /**
   * Opens the folder for a run. Throws RopewalkError ERR_EXISTS where it holds something else or the report of another
   * run, and names the first difference.
   */
  static async open(path: string, record: ReportRecord, { force = false } = {}): Promise<ReportFolder> {
    let saved = await readRecord(path)
    // --force, too, deletes only what is a report: "models" and "data" may be anyone's.
    if (!saved && (await isTaken(path))) {
      throw new RopewalkError(
        'ERR_EXISTS',
        `${path}: is there already and holds no report.json: choose another folder with --out`,
      )
    }
    const differs = saved && differenceOf(record, saved)
    // Where nothing was done yet, as after a file that could not be read, there is nothing to protect.
    if (force || (differs !== undefined && !(await hasWork(path)))) {
      for (const name of OWN) await rm(join(path, name), { recursive: true, force: true })
      saved = undefined
    } else if (differs !== undefined) {
      throw new RopewalkError(
        'ERR_EXISTS',
        `${path}: holds the report of another run: ${differs}. Choose another folder with --out, give what that run ` +
          'was given to go on with it, or --force to delete it and begin anew',
      )
    }
    // Data sets may be added later; those that are no longer given have been used.
    const folder = new ReportFolder(path, { ...record, data: { ...saved?.data, ...record.data } })
    await folder.write('report.json', folder.record)
    await folder.load()
    return folder
  }

  /** Opens a finished or unfinished report to read. Throws RopewalkError ERR_NOT_FOUND, ERR_JSON, ERR_FORMAT. */
  static async read(path: string): Promise<ReportFolder> {
    const record = await readRecord(path)
    if (!record) {
      throw new RopewalkError('ERR_NOT_FOUND', `${path}: there is no report.json: give the --out of a finished run`)
    }
    const folder = new ReportFolder(path, record)
    await folder.load()
    return folder
  }

  has(key: string): boolean {
    return this.done.has(key)
  }

  /** A finished unit's result; undefined where it is not done. */
  get<T>(key: string): T | undefined {
    return this.done.get(key) as T | undefined
  }

  keys(): string[] {
    return [...this.done.keys()].sort()
  }

  /** Keeps a unit's result, durably; `time` is anything that may differ from run to run. */
  async finish(key: string, value: unknown, time?: unknown): Promise<void> {
    if (time !== undefined) {
      await this.write(`times/${key}.json`, time)
      this.times.set(key, time)
    }
    await this.write(`units/${key}.json`, value)
    this.done.set(key, plain(value))
  }

  /** Names the files of data sets that are the report's own. */
  async setData(data: ReportRecord['data']): Promise<void> {
    this.record = { ...this.record, data: { ...this.record.data, ...data } }
    await this.write('report.json', this.record)
  }

  async begin(session: Session): Promise<void> {
    this.sessions = [...this.sessions, session]
    await this.write('sessions.json', this.sessions)
  }

  async write(name: string, content: unknown): Promise<void> {
    const path = join(this.path, name)
    try {
      await mkdir(dirname(path), { recursive: true })
      await writeFileDurable(path, typeof content === 'string' ? content : toJson(content))
    } catch (error) {
      throw await writeFailure(error, path, 1 << 20)
    }
  }

  modelPath(id: string): string {
    return join(this.path, 'models', id)
  }

  private async load(): Promise<void> {
    for (const [folder, map] of [
      ['units', this.done],
      ['times', this.times],
    ] as const) {
      for (const path of await jsonFiles(join(this.path, folder))) {
        const key = relative(join(this.path, folder), path).slice(0, -'.json'.length).split('\\').join('/')
        map.set(key, plain(parseJson(await readFile(path), path, OWN_JSON)))
      }
    }
    const sessions = await readFile(join(this.path, 'sessions.json')).catch(() => undefined)
    if (sessions) this.sessions = plain(parseJson(sessions, 'sessions.json', OWN_JSON)) as unknown as Session[]
  }
}

/** The record of the report in a folder; undefined where there is none. */
async function readRecord(path: string): Promise<ReportRecord | undefined> {
  const file = join(path, 'report.json')
  const text = await readFile(file, 'utf8').catch(() => undefined)
  if (text === undefined) return undefined
  const record = parseJson(text, file, OWN_JSON)
  if (!isObject(record) || ![record.settings, record.model, record.data].every(isObject)) {
    throw new RopewalkError(
      'ERR_FORMAT',
      `${file}: is not the record of a report (settings, model and data are missing): give another folder`,
    )
  }
  return plain(record) as unknown as ReportRecord
}

/** The first thing in which two runs differ, data sets aside that only one of them was given. */
function differenceOf(now: ReportRecord, then: ReportRecord): string | undefined {
  const names = Object.keys(now.data).filter((name) => Object.hasOwn(then.data, name))
  const some = ({ data, ...rest }: ReportRecord) =>
    plain({ ...rest, data: Object.fromEntries(names.map((name) => [name, data[name]])) })
  return difference(some(now), some(then), '')
}

/** Whether a unit is done, or a step of one that fine-tunes is kept. */
async function hasWork(path: string): Promise<boolean> {
  if (await isTaken(join(path, 'units'))) return true
  const models = await readdir(join(path, 'models')).catch(() => [])
  const checkpoints = await Promise.all(models.map((name) => listCheckpoints(join(path, 'models', name))))
  return checkpoints.some((list) => list.length > 0)
}

/** As JSON has it: what was written and what is read back are then the same. */
const plain = <T>(value: T): T => JSON.parse(JSON.stringify(value)) as T

async function jsonFiles(folder: string): Promise<string[]> {
  const entries = await readdir(folder, { recursive: true, withFileTypes: true }).catch(() => [])
  return entries
    .filter((entry) => entry.isFile() && entry.name.endsWith('.json'))
    .map((entry) => join(entry.parentPath, entry.name))
    .sort()
}

/** Bytes of each tensor that tell it from another one: training changes all of a matrix. */
const SAMPLE = 4096

/** Tells a model from another one: a hash of config.json, of the tokenizer and of the beginning of every tensor. */
export async function modelHash(path: string): Promise<string> {
  const folder = await openModelFolder(path)
  const hash = createHash('sha256')
  const handles = new Map<string, FileHandle>()
  try {
    hash.update(await readFile(join(folder.dir, 'config.json')))
    if (folder.tokenizerPath) hash.update(await sha256File(folder.tokenizerPath))
    for (const name of [...folder.tensors.keys()].sort()) {
      const { path: file, dtype, dims, offset, bytes } = folder.tensors.get(name)!
      const handle = handles.get(file) ?? (await open(file, 'r'))
      handles.set(file, handle)
      const sample = Buffer.alloc(Math.min(SAMPLE, bytes))
      await handle.read(sample, 0, sample.length, offset)
      hash.update(`${name} ${dtype} ${dims.join()}`).update(sample)
    }
    return hash.digest('hex')
  } finally {
    await Promise.all([...handles.values()].map((handle) => handle.close()))
    await folder.close()
  }
}

/** The files of a data set, by name and size: what report.json keeps of it. */
export async function describeData(paths: readonly string[]): Promise<{ file: string; bytes: number }[]> {
  const list: { file: string; bytes: number }[] = []
  for (const path of paths) {
    const info = await stat(path).catch(() => undefined)
    if (!info) throw new RopewalkError('ERR_NOT_FOUND', `${path}: there is no such file or folder`)
    if (!info.isDirectory()) {
      list.push({ file: basename(path), bytes: info.size })
      continue
    }
    const entries = await readdir(path, { recursive: true, withFileTypes: true })
    for (const entry of entries.filter((item) => item.isFile())) {
      const file = join(entry.parentPath, entry.name)
      list.push({ file: relative(path, file).split('\\').join('/'), bytes: (await stat(file)).size })
    }
  }
  return list.sort((a, b) => (a.file < b.file ? -1 : a.file > b.file ? 1 : 0))
}
