import type { Output } from './output.js'

/** Turns SIGINT and SIGTERM into an AbortSignal; the second one ends the process. `what` says what the first one does. */
export function listen(
  output: Output,
  what = 'ending after this step',
): { signal: AbortSignal; code(): number | undefined; stop(): void } {
  const controller = new AbortController()
  let code: number | undefined
  const codes = { SIGINT: 130, SIGTERM: 143 } as const
  const handler = (name: 'SIGINT' | 'SIGTERM'): void => {
    if (code !== undefined) process.exit(codes[name])
    code = codes[name]
    output.note(`${name}: ${what}; once more to end at once`)
    controller.abort()
  }
  process.on('SIGINT', handler)
  process.on('SIGTERM', handler)
  return {
    signal: controller.signal,
    code: () => code,
    stop() {
      process.off('SIGINT', handler)
      process.off('SIGTERM', handler)
    },
  }
}
