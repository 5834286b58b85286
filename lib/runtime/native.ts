import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { RopewalkError } from '../errors.js'
import { TABLE_HASH } from './ops.gen.js'

/** What csrc/addon.cc exports. Handles are numbers; offsets and sizes are bytes. */
export interface Native {
  tableHash: string
  backends(): { name: string; available: boolean; detail: string }[]
  openDevice(backend: string, index: number, threads: number): number
  closeDevice(device: number): void
  describe(device: number): string
  cancel(device: number): void
  alloc(device: number, bytes: number): number
  free(buffer: number): void
  upload(buffer: number, offset: number, bytes: Uint8Array): Promise<void>
  download(buffer: number, offset: number, bytes: number): Promise<Uint8Array>
  read(
    buffer: number,
    offset: number,
    dtype: number,
    fd: number,
    fileOffset: number,
    fileDtype: number,
    count: number,
  ): Promise<void>
  loadPlan(device: number, name: string, words: Float64Array, buffers: Uint32Array): number
  freePlan(plan: number): void
  run(plan: number): Promise<void>
}

let loaded: Native | undefined

/** The package's root: this file lies two levels below it, as source and as built code alike. */
export const PACKAGE_ROOT = join(dirname(fileURLToPath(import.meta.url)), '..', '..')

/** Loads the addon: build/Release if it was built here, else the prebuilt one for this platform. */
export function native(): Native {
  if (loaded) return loaded
  let addon: Native
  try {
    addon = createRequire(import.meta.url)('node-gyp-build')(PACKAGE_ROOT) as Native
  } catch (error) {
    throw new RopewalkError(
      'ERR_NO_ADDON',
      `no native addon for ${process.platform}-${process.arch} (Node ${process.versions.node}): ` +
        `${(error as Error).message.split('\n')[0]}. Build it from source: npx ropewalk build ` +
        '(needs CMake >= 3.18 and a C++17 compiler)',
    )
  }
  if (addon.tableHash !== TABLE_HASH) {
    throw new RopewalkError(
      'ERR_STALE_ADDON',
      `the native addon was built from another op table (${addon.tableHash}, expected ${TABLE_HASH}): rebuild it with ` +
        'npm run build:native (in a clone) or npx ropewalk build',
    )
  }
  return (loaded = addon)
}
