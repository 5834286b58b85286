import { createHash } from 'node:crypto'
import { closeSync, existsSync, openSync, readdirSync, readFileSync, readSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, relative } from 'node:path'
import { fileURLToPath } from 'node:url'
import { RopewalkError } from '../errors.js'
import { TABLE_HASH } from './ops.gen.js'

/**
 * What {@link Device.memory} gives, a GPU's memory in bytes.
 *
 * @category Devices and errors
 */
export interface DeviceMemory {
  /** What nobody has allocated, this process or another. */
  freeBytes: number
  /** What the card has. */
  totalBytes: number
}

/** What csrc/addon.cc exports. Handles are numbers; offsets and sizes are bytes. */
export interface Native {
  tableHash: string
  useCudaLibrary(path: string, fault: string): void
  backends(): { name: string; available: boolean; detail: string; memory?: DeviceMemory }[]
  openDevice(backend: string, index: number, threads: number): number
  closeDevice(device: number): void
  describe(device: number): { description: string; workspaceBytes: number }
  memory(device: number): DeviceMemory | undefined
  cancel(device: number): void
  alloc(device: number, bytes: number, host: boolean): number
  mapFile(device: number, fd: number, path: string): { buffer: number; bytes: number } | undefined
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
  ): Promise<number>
  findNotFinite(buffer: number, offset: number, dtype: number, count: number): Promise<number>
  loadPlan(device: number, name: string, words: Float64Array, buffers: Uint32Array): number
  freePlan(plan: number): void
  run(plan: number): Promise<void>
}

/** The package's root: this file lies two levels below it, as source and as built code alike. */
export const PACKAGE_ROOT = join(dirname(fileURLToPath(import.meta.url)), '..', '..')

/** Where `ropewalk build` and `npm run build:native` put the addon. */
export const BUILT_ADDON = join('build', 'Release', 'ropewalk.node')

const REBUILD = 'npx ropewalk build (in a clone: npm run build:native)'

let loaded: Native | undefined

/** Loads the addon: build/Release if it was built here, else the prebuilt one for this platform. */
export function native(): Native {
  if (loaded) return loaded
  const addon = loadAddon(addonPath())
  const library = cudaLibraryPath()
  const file = join(PACKAGE_ROOT, library)
  const fault = existsSync(file) ? findFault(library) : undefined
  addon.useCudaLibrary(file, fault ? `${fault}; reinstall ropewalk, or build it here: ${REBUILD}` : '')
  return (loaded = addon)
}

/** The CUDA library's file, relative to PACKAGE_ROOT: the one built here, else the prebuilt one, which may be missing. */
function cudaLibraryPath(): string {
  const name = 'libropewalk_cuda.so'
  const built = join(dirname(BUILT_ADDON), name)
  if (existsSync(join(PACKAGE_ROOT, built)) && process.env.PREBUILDS_ONLY !== '1') return built
  return join('prebuilds', `${process.platform}-${process.arch}`, name)
}

/**
 * The addon's file, relative to PACKAGE_ROOT, as node-gyp-build finds it: the one built here, else the prebuilt one for
 * this platform. PREBUILDS_ONLY=1 passes over the one that was built here.
 */
export function addonPath(): string {
  const libc = process.platform !== 'linux' ? '' : readStart(process.execPath).includes('ld-musl') ? 'musl' : 'glibc'
  // node-gyp-build knows musl by Alpine's files only, unless this says so
  if (libc === 'musl') process.env.LIBC ??= libc
  const { path } = createRequire(import.meta.url)('node-gyp-build') as { path(root: string): string }
  try {
    return relative(PACKAGE_ROOT, path(PACKAGE_ROOT))
  } catch (cause) {
    const platform = `${process.platform}-${process.arch}`
    const folder = join(PACKAGE_ROOT, 'prebuilds')
    const others = existsSync(folder) ? readdirSync(folder, { recursive: true }).map(String) : []
    const shipped = others.filter((name) => name.endsWith('.node')).join(', ') || 'none'
    const [line = ''] = (cause as Error).message.split('\n')
    throw new RopewalkError(
      'ERR_NO_ADDON',
      `no native addon for ${platform}${libc && ` with ${libc}`} (${line}); looked in ${PACKAGE_ROOT} for ${BUILT_ADDON} and prebuilds/${platform}/ropewalk.${libc && `${libc}.`}node; ` +
        `prebuilt ones here: ${shipped}. Build it from source: ${REBUILD}`,
      { cause },
    )
  }
}

/** Loads one addon file; `path` is relative to PACKAGE_ROOT. */
function loadAddon(path: string): Native {
  const file = join(PACKAGE_ROOT, path)
  const remedy = path === BUILT_ADDON ? `rebuild it: ${REBUILD}` : `reinstall ropewalk, or build it here: ${REBUILD}`
  const refuse = (reason: string, cause?: unknown): never => {
    throw new RopewalkError('ERR_BAD_ADDON', `the native addon ${file} ${reason}; ${remedy}`, { cause })
  }
  const fault = findFault(path)
  if (fault) refuse(fault)
  let addon: Partial<Native> = {}
  try {
    addon = createRequire(import.meta.url)(file) as Partial<Native>
  } catch (error) {
    const [reason = ''] = (error as Error).message.split('\n')
    refuse(reason.startsWith('Module did not self-register') ? 'is not an addon' : `cannot be loaded: ${reason}`, error)
  }
  if (typeof addon.tableHash !== 'string') refuse("is not ropewalk's")
  if (addon.tableHash !== TABLE_HASH) {
    throw new RopewalkError(
      'ERR_STALE_ADDON',
      `the native addon ${file} was built from another op table (${addon.tableHash}, expected ${TABLE_HASH}); ${remedy}`,
    )
  }
  return addon as Native
}

/**
 * Why a file must not be loaded, undefined where nothing speaks against it. The loader of Linux crashes on a truncated
 * file, says "No such file" of one for another machine, and does not notice changed bytes.
 */
function findFault(path: string): string | undefined {
  const bytes = readFileSync(join(PACKAGE_ROOT, path))
  if (process.platform === 'linux') {
    if (bytes.length < 64 || bytes.readUInt32BE(0) !== 0x7f454c46) return 'is damaged: it is no ELF file'
    const node = readStart(process.execPath)
    if (bytes[4] !== node[4] || bytes.readUInt16LE(18) !== node.readUInt16LE(18)) return 'is for another processor'
    // The table of sections comes last in the file.
    const end = Number(bytes.readBigUInt64LE(40)) + bytes.readUInt16LE(58) * bytes.readUInt16LE(60)
    if (bytes.length < end) return `is damaged: it has ${bytes.length} of ${end} bytes`
  }
  if (dirname(path) === dirname(BUILT_ADDON)) return
  const sums = join(PACKAGE_ROOT, 'prebuilds', 'SHA256SUMS')
  const hash = createHash('sha256').update(bytes).digest('hex')
  const listed = existsSync(sums) && readFileSync(sums, 'utf8').includes(`${hash}  `)
  return listed ? undefined : `is not the one that was shipped: its SHA-256 ${hash} is not in ${sums}`
}

/** The first bytes of a file: of an ELF file its header and the name of its loader. */
function readStart(file: string): Buffer {
  const fd = openSync(file, 'r')
  try {
    const start = Buffer.alloc(2048)
    readSync(fd, start)
    return start
  } finally {
    closeSync(fd)
  }
}
