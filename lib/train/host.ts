import { readFileSync } from 'node:fs'
import { freemem, totalmem } from 'node:os'
import { readBytes } from './gpus.js'

/**
 * Memory that this process can still get, limits of its container included, or what the environment variable
 * ROPEWALK_MEMORY says instead.
 */
export function availableBytes(): number | undefined {
  const given = process.env['ROPEWALK_MEMORY']
  if (given !== undefined && given !== '') return readBytes(given, 'ROPEWALK_MEMORY')
  const limited = process.constrainedMemory() < totalmem()
  // A container's limit counts the files that it has read, which make room as soon as anything else wants it.
  const bytes = limited ? Math.min(freemem(), process.availableMemory() + cachedBytes()) : freemem()
  return bytes > 0 && Number.isFinite(bytes) ? bytes : undefined
}

/** Bytes of files in the page cache that count for this process's container; 0 where the system does not say. */
export function cachedBytes(read = (path: string): string => readFileSync(path, 'utf8')): number {
  const attempt = (path: string): string => {
    try {
      return read(path)
    } catch {
      return ''
    }
  }
  const groups = attempt('/proc/self/cgroup')
  const [, first = '/'] = /^\d+:memory:(.*)$/m.exec(groups) ?? []
  const [, second = '/'] = /^0::(.*)$/m.exec(groups) ?? []
  // Inside of a container its own group is the root of what can be seen, whatever its path outside is.
  for (const path of [`memory${first}`, 'memory', second, '']) {
    const stat = attempt(`/sys/fs/cgroup/${path}/memory.stat`.replace(/\/+/g, '/'))
    if (stat === '') continue
    const of = (name: string): number => Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(stat)?.[1] ?? NaN)
    const [active, inactive] = ['active_file', 'inactive_file'].map((name) => of(`total_${name}`) || of(name))
    return active! + inactive! || 0
  }
  return 0
}
