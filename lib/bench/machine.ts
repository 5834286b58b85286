import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism, cpus, loadavg, release, totalmem } from 'node:os'
import { join } from 'node:path'
import { PACKAGE_ROOT } from '../runtime/native.js'
import { Device } from '../runtime/device.js'

/** What a result depends on beside the code. */
export interface Machine {
  /** Of the device that was measured: its name, and one line for people. */
  device: string
  deviceDescription: string
  cpu: string
  cores: number
  /** The kernels in use: baseline, avx2, avx512, amx. */
  isa: string
  /** Bytes of the last level of cache; 32 MB where it is not known. */
  cacheBytes: number
  memoryBytes: number
  system: string
  node: string
  ropewalk: string
  /** Of the clone; null in an installed package. `+` where files were changed. */
  commit: string | null
  date: string
  /** Processes that wanted to run, averaged over a minute. */
  loadBefore: number
}

/** `measured`: the device, open. */
export function describeMachine(measured: Device): Machine {
  using cpu = Device.open('cpu', { threads: 1 })
  const { version } = createRequire(import.meta.url)(join(PACKAGE_ROOT, 'package.json')) as { version: string }
  return {
    device: measured.name,
    deviceDescription: measured.description,
    cpu: cpus()[0]?.model.trim() ?? process.arch,
    cores: availableParallelism(),
    isa: cpu.description.split(',')[0]!,
    cacheBytes: cacheBytes(),
    memoryBytes: totalmem(),
    system: `${process.platform}-${process.arch} ${release()}`,
    node: process.versions.node,
    ropewalk: version,
    commit: commit(),
    date: new Date().toISOString(),
    loadBefore: load(),
  }
}

export const load = (): number => Math.round(100 * loadavg()[0]!) / 100

function cacheBytes(): number {
  try {
    const text = readFileSync('/sys/devices/system/cpu/cpu0/cache/index3/size', 'utf8')
    const [, size, unit] = /^(\d+)([KM])/.exec(text)!
    return Number(size) * (unit === 'M' ? 2 ** 20 : 2 ** 10)
  } catch {
    return 32 << 20 // another system, or no third level
  }
}

function commit(): string | null {
  const bundled = join(PACKAGE_ROOT, 'bundle.json') // see scripts/gpu-bundle.js
  if (existsSync(bundled)) return (JSON.parse(readFileSync(bundled, 'utf8')) as { commit: string }).commit
  if (!existsSync(join(PACKAGE_ROOT, '.git'))) return null
  const git = (...args: string[]): string =>
    execFileSync('git', args, { cwd: PACKAGE_ROOT, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim()
  try {
    return git('rev-parse', '--short=12', 'HEAD') + (git('status', '--porcelain', '-uno') === '' ? '' : '+')
  } catch {
    return null
  }
}
