// Runs command lines of `ropewalk` in the process of a test.
import { runCommand } from '../../lib/cli/commands.js'

export interface Result {
  code: number
  stdout: string
  stderr: string
}

/** What a command line prints on both streams, and its exit code. */
export async function ropewalk(...args: string[]): Promise<Result> {
  const result: Result = { code: 0, stdout: '', stderr: '' }
  const sink = (name: 'stdout' | 'stderr') => ({ write: (part: string) => (result[name] += part) })
  result.code = await runCommand(args, { stdout: sink('stdout'), stderr: sink('stderr') })
  return result
}
