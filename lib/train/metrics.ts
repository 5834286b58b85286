import { type FileHandle, open, readFile } from 'node:fs/promises'
import { writeAll, writeFailure, writeFileDurable } from '../files/durable.js'

/**
 * metrics.jsonl: one JSON object a step, written when the step is done, one write a line. Numbers that are not finite
 * are null. It is made durable by `sync`, at every checkpoint.
 */
export class MetricsLog {
  private constructor(
    private readonly path: string,
    private readonly handle: FileHandle,
  ) {}

  /** Opens the log of a run that stands at `step`: later lines, and one cut off by a crash, are taken out first. */
  static async open(path: string, step: number): Promise<MetricsLog> {
    const text = await readFile(path, 'utf8').catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return ''
      throw error
    })
    const kept = text
      .split('\n')
      .filter((line) => stepOf(line) <= step)
      .map((line) => `${line}\n`)
      .join('')
    if (kept !== text) await writeFileDurable(path, kept)
    return new MetricsLog(path, await open(path, 'a'))
  }

  async append(metrics: object): Promise<void> {
    const line = Buffer.from(`${JSON.stringify(metrics)}\n`)
    try {
      await writeAll(this.handle, line)
    } catch (error) {
      throw await writeFailure(error, this.path, line.length)
    }
  }

  async sync(): Promise<void> {
    try {
      await this.handle.sync()
    } catch (error) {
      throw await writeFailure(error, this.path, 0)
    }
  }

  async close(): Promise<void> {
    await this.handle.close()
  }
}

/** Infinity for what is no line of ours. */
function stepOf(line: string): number {
  try {
    const { step } = JSON.parse(line) as { step?: unknown }
    return typeof step === 'number' ? step : Infinity
  } catch {
    return Infinity
  }
}
