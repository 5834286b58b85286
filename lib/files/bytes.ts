import { open } from 'node:fs/promises'
import { formatBytes, RopewalkError } from '../errors.js'

/** The bytes of a regular file of at most `maxBytes`: a size in a directory entry never decides an allocation alone. */
export async function readSmallFile(path: string, maxBytes: number, name = path): Promise<Uint8Array> {
  const handle = await open(path, 'r')
  try {
    const stat = await handle.stat()
    if (!stat.isFile()) throw new RopewalkError('ERR_NOT_A_FILE', `${name}: not a regular file`)
    if (stat.size > maxBytes) {
      throw new RopewalkError(
        'ERR_TOO_LARGE',
        `${name}: ${formatBytes(stat.size)}, but such a file is read up to ${formatBytes(maxBytes)}: is it the right file?`,
      )
    }
    return await handle.readFile()
  } finally {
    await handle.close()
  }
}

/** Strict UTF-8; the error names the offset of the first byte that is not. */
export function decodeUtf8(bytes: Uint8Array, file: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
  } catch (cause) {
    if (!(cause instanceof TypeError)) throw cause
    const offset = firstInvalidByte(bytes)
    throw new RopewalkError(
      'ERR_UTF8',
      `${file}: byte ${offset} (0x${bytes[offset]?.toString(16).padStart(2, '0') ?? '??'}) is not valid UTF-8: ` +
        'the file is damaged or in another encoding; convert it to UTF-8',
      { cause },
    )
  }
}

function firstInvalidByte(bytes: Uint8Array): number {
  // the lossy decoder puts U+FFFD where it fails; one that stands in the file itself is not the place
  const lossy = new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes)
  let offset = 0
  let from = 0
  for (;;) {
    const at = lossy.indexOf('\ufffd', from)
    if (at < 0) return offset
    offset += Buffer.byteLength(lossy.slice(from, at))
    if (bytes[offset] !== 0xef || bytes[offset + 1] !== 0xbf || bytes[offset + 2] !== 0xbd) return offset
    offset += 3
    from = at + 1
  }
}
