import { createHash, randomBytes } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { type FileHandle, lstat, open, readdir, rename, rm, rmdir, statfs } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { formatBytes, RopewalkError } from '../errors.js'

/**
 * Files that survive a crash: write, fsync, rename, fsync of the directory. An fsync that failed is never tried again:
 * the kernel may have dropped the pages, and the second call would report success over lost data.
 */

/** Makes the names in a directory durable. Windows has no such call and writes names through. */
export async function fsyncDir(path: string): Promise<void> {
  if (process.platform === 'win32') return
  const handle = await open(path, 'r')
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** Replaces (or creates) `path` by `bytes`: after a crash it holds the old content or the new one, never a part. */
export async function writeFileDurable(path: string, bytes: Uint8Array | string): Promise<void> {
  const temporary = temporaryName(path)
  const content = typeof bytes === 'string' ? Buffer.from(bytes) : bytes
  try {
    await writeNewFile(temporary, content)
    await rename(temporary, path)
    await fsyncDir(dirname(path))
  } catch (error) {
    await rm(temporary, { force: true })
    throw await writeFailure(error, path, content.byteLength)
  }
}

/** Writes a file that must not exist yet and fsyncs it; the directory is the caller's. */
export async function writeNewFile(path: string, bytes: Uint8Array): Promise<void> {
  const handle = await open(path, 'wx')
  try {
    await writeAll(handle, bytes)
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** Writes all of `bytes` at the handle's position: one write call may take less than it was given. */
export async function writeAll(handle: FileHandle, bytes: Uint8Array): Promise<void> {
  let done = 0
  while (done < bytes.byteLength) {
    const { bytesWritten } = await handle.write(bytes, done, bytes.byteLength - done)
    done += bytesWritten
  }
}

/**
 * Renames the finished folder `temporary` to `target`, durably. A target that exists (and is not an empty folder) is an
 * error, unless `overwrite`: then it is renamed to `<target>.old-<pid>-<random>`, stays until the new one is in place, and is
 * deleted last. A crash in between leaves both complete folders on the disk.
 */
export async function replaceFolder(
  temporary: string,
  target: string,
  { overwrite = false }: { overwrite?: boolean } = {},
): Promise<void> {
  const parent = dirname(resolve(target))
  const taken = await isTaken(target)
  if (taken && !overwrite) throw existsError(target)
  await fsyncDir(temporary)
  const aside = temporaryName(target, 'old')
  if (taken) await rename(target, aside)
  try {
    // rename replaces an empty folder in one step on POSIX; Windows wants it gone
    if (!taken && process.platform === 'win32') await rmdir(target).catch(() => undefined)
    await rename(temporary, target)
    await fsyncDir(parent)
  } catch (error) {
    if (taken) await rename(aside, target).catch(() => undefined)
    throw error
  }
  if (taken) await rm(aside, { recursive: true, force: true })
}

/** True where something stands at `target` that a new folder may not replace in silence. */
export async function isTaken(target: string): Promise<boolean> {
  const stat = await lstat(target).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined
    throw error
  })
  if (stat === undefined) return false
  return !stat.isDirectory() || (await readdir(target)).length > 0
}

export function existsError(target: string): RopewalkError {
  return new RopewalkError(
    'ERR_EXISTS',
    `${target}: exists already and is not overwritten: choose another folder, or set overwrite: true`,
  )
}

/** The folders that a crash inside replaceFolder can have left beside `target`: complete, under their old name. */
export async function leftAside(target: string): Promise<string[]> {
  const parent = dirname(resolve(target))
  const names = await readdir(parent).catch(() => [])
  return names.filter((name) => name.startsWith(`${basename(resolve(target))}.old-`)).map((name) => join(parent, name))
}

/** A name beside `path`, on the same file system: unique, also after a crash in a container that repeats its pids. */
export function temporaryName(path: string, kind: 'tmp' | 'old' = 'tmp'): string {
  return `${resolve(path)}.${kind}-${process.pid}-${randomBytes(4).toString('hex')}`
}

/** SHA-256 of a file, hexadecimal. */
export async function sha256File(path: string): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(createReadStream(path, { highWaterMark: 1 << 20 }), hash)
  return hash.digest('hex')
}

/** Refuses before the first byte is written where the file system of `dir` has less than `needed` bytes free. */
export async function requireSpace(dir: string, needed: number): Promise<void> {
  const free = await freeBytes(dir)
  if (free !== undefined && free < needed) throw noSpace(dir, needed, free)
}

/** The error to report for a failed write of `needed` bytes to `path`; a full disk is named with what is free. */
export async function writeFailure(error: unknown, path: string, needed: number): Promise<unknown> {
  if (error instanceof RopewalkError) return error
  const code = (error as NodeJS.ErrnoException | undefined)?.code
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return noSpace(path, needed, await freeBytes(dirname(resolve(path))), error, code === 'EDQUOT')
  }
  if (code === undefined || !/^E[A-Z0-9]+$/.test(code)) return error
  return new RopewalkError('ERR_WRITE', `${path}: cannot be written (${(error as Error).message})`, { cause: error })
}

function noSpace(
  path: string,
  needed: number,
  free: number | undefined,
  cause?: unknown,
  quota = false,
): RopewalkError {
  return new RopewalkError(
    'ERR_NO_SPACE',
    `${path}: ${quota ? 'the disk quota is used up' : 'the disk is full'}: ${formatBytes(needed)} are needed, ` +
      `${free === undefined ? 'an unknown number' : formatBytes(free)} free: delete something, or choose another disk`,
    { cause },
  )
}

async function freeBytes(dir: string): Promise<number | undefined> {
  const stat = await statfs(dir).catch(() => undefined)
  return stat === undefined ? undefined : stat.bavail * stat.bsize
}
