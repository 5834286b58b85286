// `npm run demo`: sets up what is missing or stale, then runs `ropewalk demo` with the arguments given.
import { join } from 'node:path'
import { root, run, setup } from './setup.js'

setup()
// The command ends itself on Ctrl-C, and cleans up; this process waits for it.
process.on('SIGINT', () => undefined)
run(process.execPath, [join(root, 'dist', 'cli', 'main.js'), 'demo', ...process.argv.slice(2)])
