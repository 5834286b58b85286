// Formatter and linter of both languages: prettier and eslint for TypeScript and JavaScript, clang-format for C++.
// `--fix` rewrites files instead of complaining.
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { root } from './setup.js'

const fix = process.argv.includes('--fix')
const bin = (name) => join(root, 'node_modules', '.bin', name)

function filesIn(folder, pattern) {
  return readdirSync(join(root, folder), { recursive: true })
    .map((name) => join(folder, name))
    .filter((name) => pattern.test(name))
}

const cpp = [...filesIn('csrc', /\.(cc|h|cu)$/), ...filesIn('test/native', /\.(cc|h)$/)]
const commands = [
  [bin('prettier'), [fix ? '--write' : '--check', '--log-level', 'warn', 'lib', 'test', 'bench', 'scripts']],
  [bin('eslint'), [...(fix ? ['--fix'] : []), '--max-warnings=0', 'lib', 'test', 'scripts']],
  [bin('clang-format'), fix ? ['-i', ...cpp] : ['--dry-run', '--Werror', ...cpp]],
]
let failed = false
for (const [command, args] of commands) {
  const { status } = spawnSync(command, args, { cwd: root, stdio: 'inherit' })
  if (status !== 0) failed = true
}
if (failed && !fix) console.error('lint: `npm run format` mends what can be mended')
process.exit(failed ? 1 : 0)
