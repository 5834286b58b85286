/** A stream that the command line writes to; `isTTY` turns the moving progress bar on. */
export interface Sink {
  write(text: string): unknown
  isTTY?: boolean
  columns?: number
}

/** A running task's display. `update` may be called as often as wanted. */
export interface Progress {
  update(done: number, detail?: string): void
  end(): void
}

const BAR = 24
/** Milliseconds between two drawings of the bar. */
const REDRAW = 80

/**
 * Where a command writes: results on stdout (text, or JSON when --json is given), all else on stderr. With --json nothing
 * but JSON reaches stdout.
 */
export class Output {
  constructor(
    readonly stdout: Sink,
    readonly stderr: Sink,
    readonly json: boolean,
  ) {}

  /** A line of the result for people. */
  line(text = ''): void {
    if (!this.json) this.stdout.write(`${text}\n`)
  }

  /** The result as one JSON line. undefined becomes null, so that every document has the same keys. */
  value(value: unknown): void {
    if (this.json) this.stdout.write(`${JSON.stringify(value, (_, field) => (field === undefined ? null : field))}\n`)
  }

  /** A remark that is no result. */
  note(text: string): void {
    this.stderr.write(`${text}\n`)
  }

  /** Columns aligned, numbers to the right. */
  table(head: readonly string[], rows: readonly (readonly (string | number)[])[]): void {
    const cells = [head, ...rows].map((row) => row.map(String))
    const widths = head.map((_, column) => Math.max(...cells.map((row) => row[column]!.length)))
    for (const row of cells) {
      const padded = row.map((cell, column) => {
        const numeric = rows.every((other) => typeof other[column] === 'number' || other[column] === '-')
        return numeric ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!)
      })
      this.line(padded.join('  ').trimEnd())
    }
  }

  /**
   * A bar with the time left on a terminal; elsewhere lines on stderr: one for each update ('each') or one for each tenth
   * ('tenths').
   */
  progress(label: string, total: number, lines: 'each' | 'tenths' = 'tenths'): Progress {
    const clock = new Clock(total)
    if (this.stderr.isTTY) return new Bar(this.stderr, label, total, clock)
    let tenth = 0
    return {
      update: (done, detail = '') => {
        const left = clock.left(done)
        const reached = Math.floor((10 * done) / total)
        if (lines === 'tenths' && reached === tenth) return
        tenth = reached
        this.note(`${label} ${done}/${total}${detail && ` ${detail}`}${left}`)
      },
      end: () => undefined,
    }
  }
}

class Bar implements Progress {
  private drawn = -Infinity
  private width = 0

  constructor(
    private readonly stream: Sink,
    private readonly label: string,
    private readonly total: number,
    private readonly clock: Clock,
  ) {}

  update(done: number, detail = ''): void {
    const left = this.clock.left(done)
    const now = performance.now()
    if (now - this.drawn < REDRAW && done < this.total) return
    this.drawn = now
    const filled = Math.min(BAR, Math.floor((BAR * done) / this.total))
    const bar = '#'.repeat(filled) + '-'.repeat(BAR - filled)
    const text = `${this.label} [${bar}] ${done}/${this.total}${detail && ` ${detail}`}${left}`
    const line = text.slice(0, (this.stream.columns ?? 80) - 1)
    this.stream.write(`\r${line.padEnd(this.width)}`)
    this.width = line.length
  }

  end(): void {
    if (this.width > 0) this.stream.write(`\r${' '.repeat(this.width)}\r`)
    this.width = 0
  }
}

/** Tells the time left from the pace so far; work may start in the middle (a resumed run). */
class Clock {
  private readonly started = performance.now()
  private base: number | undefined

  constructor(private readonly total: number) {}

  /** ", 5 min left" after `done` of the total; '' when nothing is left. */
  left(done: number): string {
    this.base ??= done - 1
    if (done >= this.total) return ''
    const pace = (performance.now() - this.started) / 1000 / (done - this.base)
    return `, ${formatDuration(pace * (this.total - done))} left`
  }
}

/** 3725 -> "1 h 2 min" */
export function formatDuration(seconds: number): string {
  if (seconds < 60) return `${Math.ceil(seconds)} s`
  const minutes = Math.round(seconds / 60)
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`
}

/** Four significant digits, without an exponent below a million. */
export function formatNumber(value: number): string {
  const magnitude = Math.abs(value)
  if (magnitude !== 0 && (magnitude >= 1e6 || magnitude < 1e-3)) return value.toExponential(3)
  return String(Number(value.toPrecision(Math.max(4, Math.ceil(Math.log10(magnitude + 1))))))
}
