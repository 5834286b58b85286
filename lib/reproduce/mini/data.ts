import { mkdir, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Dice } from '../../demo/data.js'
import { writeFileDurable } from '../../files/durable.js'
import { loadTokenizer } from '../../files/tokenizer.js'
import { type Settings, windowOf } from '../settings.js'
import { choiceSets, govReport } from './sets.js'
import { Writer } from './texts.js'

/** How many people the two corpora are about: of more of them, a text has to be longer before it repeats itself. */
export const PEOPLE = { pg19: 8, 'proof-pile': 24 } as const

export interface MiniatureData {
  data: Record<string, string[]>
  /** Where tokenised texts are kept. */
  cacheDir: string
}

/**
 * Writes the miniature's data sets into a folder, in the formats of those that they stand for, if they are not there
 * yet. They follow from the settings alone.
 */
export async function miniatureData(
  folder: string,
  base: string,
  window: number,
  settings: Settings,
  onProgress?: (task: string) => void,
): Promise<MiniatureData> {
  await mkdir(folder, { recursive: true })
  const tokenizer = await loadTokenizer(base)
  const writer = new Writer(tokenizer)
  const { seed, documents, extensions } = settings
  const largest = Math.max(...extensions.map(({ factor }) => windowOf(window, factor)))
  const files: Record<string, () => string> = {}
  Object.entries(PEOPLE).forEach(([name, people], n) => {
    files[name] = () => {
      const dice = new Dice(10_000 * seed + n)
      return lines(Array.from({ length: documents }, () => ({ text: writer.prose(dice, people, largest) })))
    }
  })
  for (const { factor, steps, batchSize, accumulate } of extensions) {
    files[`train-${factor}`] = () => {
      const dice = new Dice(10_000 * seed + 500 + factor)
      const length = windowOf(window, factor)
      const rows = Array.from({ length: steps * batchSize * accumulate }, () => writer.window(dice, length))
      return lines(rows.flat().map((text) => ({ text })))
    }
  }
  for (const [name, make] of Object.entries(choiceSets(settings, writer, window))) files[name] = () => lines(make())
  for (const [name, make] of Object.entries(govReport(settings, writer, window))) files[name] = () => lines(make())
  const data: Record<string, string[]> = {}
  for (const [name, make] of Object.entries(files)) {
    const path = join(folder, `${name}.jsonl`)
    data[name] = [path]
    const there = await readFile(path).catch(() => undefined)
    if (there) continue
    onProgress?.(`writing ${name}`)
    await writeFileDurable(path, make())
  }
  return { data, cacheDir: join(folder, 'tokens') }
}

const lines = (rows: readonly object[]): string => rows.map((row) => `${JSON.stringify(row)}\n`).join('')
