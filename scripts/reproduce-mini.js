// `npm run reproduce:mini`: sets up what is missing or stale, then runs `ropewalk reproduce --mini` with the arguments given.
import { join } from 'node:path'
import { root, run, setup } from './setup.js'

setup()
// The command ends itself on Ctrl-C, and keeps what is done; this process waits for it.
process.on('SIGINT', () => undefined)
run(process.execPath, [join(root, 'dist', 'cli', 'main.js'), 'reproduce', '--mini', ...process.argv.slice(2)])
