import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

/** All files of a folder with their hashes. */
export function listing(where: string): Record<string, string> {
  const names = readdirSync(where).sort()
  const hash = (name: string) =>
    createHash('sha256')
      .update(readFileSync(join(where, name)))
      .digest('hex')
  return Object.fromEntries(names.map((name) => [name, hash(name)]))
}
