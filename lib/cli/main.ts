#!/usr/bin/env node
import { runCommand } from './commands.js'

// A reader that went away (ropewalk ... | head) is no failure of what prints; what trains is stopped as by Ctrl-C, saves, and
// ends with the code of that. Later writes fail in the same way.
let gone = false
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code !== 'EPIPE') process.exit(1)
  if (gone) return
  gone = true
  if (process.listenerCount('SIGINT') === 0) process.exit(0)
  process.stderr.write('ropewalk: nobody reads stdout any more\n')
  process.emit('SIGINT', 'SIGINT')
})
process.exitCode = await runCommand(process.argv.slice(2), { stdout: process.stdout, stderr: process.stderr })
