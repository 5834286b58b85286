#!/usr/bin/env node
import { runCommand } from './commands.js'

// A reader that went away (ropewalk ... | head) is no failure.
process.stdout.on('error', (error: NodeJS.ErrnoException) => process.exit(error.code === 'EPIPE' ? 0 : 1))
process.exitCode = await runCommand(process.argv.slice(2), { stdout: process.stdout, stderr: process.stderr })
