import { ThriftReader } from './thrift.js'

/** Parquet's encodings of byte strings and of small numbers (Encodings.md), with every count held against the bytes. */

/** PLAIN byte arrays: a length of 4 bytes before each. */
export function plainValues(data: Uint8Array, values: number): Uint8Array[] {
  if (values * 4 > data.length) throw new RangeError(`${values} values in ${data.length} bytes`)
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength)
  let offset = 0
  return Array.from({ length: values }, () => {
    const length = view.getUint32(offset, true)
    offset += 4
    if (length > data.length - offset)
      throw new RangeError(`a value of ${length} bytes, but ${data.length - offset} are left`)
    offset += length
    return data.subarray(offset - length, offset)
  })
}

/** PLAIN values of `width` bytes each; of 1 / 8 of a byte, bits, least significant first, each in a byte of its own. */
export function fixedValues(data: Uint8Array, values: number, width: number): Uint8Array[] {
  if (values * width > data.length) throw new RangeError(`${values} values in ${data.length} bytes`)
  return Array.from({ length: values }, (_, i) =>
    width < 1 ? Uint8Array.of((data[i >> 3]! >> (i & 7)) & 1) : data.subarray(i * width, (i + 1) * width),
  )
}

/** The RLE / bit-packing hybrid: exactly `values` numbers of `width` bits. */
export function hybrid(data: Uint8Array, width: number, values: number): Int32Array {
  if (width > 31) throw new RangeError(`indices of ${width} bits`)
  const result = new Int32Array(values)
  const byte = (at: number): number => {
    if (at >= data.length) throw new RangeError(`the data of ${values} values ends after ${data.length} bytes`)
    return data[at]
  }
  let at = 0
  let done = 0
  while (done < values) {
    let run = 0
    for (let shift = 0; ; shift += 7) {
      const part = byte(at++)
      run += (part & 127) * 2 ** shift
      if (part < 128) break
      if (shift > 28) throw new RangeError('a run length of more than 35 bits')
    }
    if (run % 2 === 0) {
      let value = 0
      for (let i = 0; i < width; i += 8) value |= byte(at++) << i
      const end = Math.min(done + run / 2, values)
      if (end === done) throw new RangeError('an empty run')
      result.fill(value, done, end)
      done = end
      continue
    }
    // groups of 8 values; the last group may reach beyond the count
    const packed = ((run - 1) / 2) * 8
    const start = at * 8
    for (let i = 0; i < packed && done < values; i++) {
      let value = 0
      for (let bit = 0; bit < width; bit++) {
        const place = start + i * width + bit
        value |= ((byte(place >> 3) >> (place & 7)) & 1) << bit
      }
      result[done++] = value
    }
    at += (packed / 8) * width
  }
  return result
}

/** DELTA_LENGTH_BYTE_ARRAY: all lengths, as packed differences, then all bytes. */
export function deltaLengthValues(data: Uint8Array, values: number): Uint8Array[] {
  if (values === 0) return []
  const reader = new ThriftReader(data)
  const blockSize = Number(reader.varint())
  const miniblocks = Number(reader.varint())
  const total = Number(reader.varint())
  if (
    total !== values ||
    miniblocks < 1 ||
    miniblocks > 512 ||
    blockSize > 2 ** 16 ||
    (blockSize / miniblocks) % 8 !== 0
  ) {
    throw new RangeError(`lengths: ${total} of ${values} values in blocks of ${blockSize} / ${miniblocks}`)
  }
  const perMiniblock = blockSize / miniblocks
  const lengths = [Number(reader.zigzag())]
  while (lengths.length < values) {
    const least = Number(reader.zigzag())
    const widths = reader.take(miniblocks)
    for (const width of widths) {
      if (lengths.length >= values) break
      // a miniblock is whole in the data, also where its last values are not used
      const packed = reader.take((perMiniblock * width) / 8)
      if (width > 32) throw new RangeError(`lengths of ${width} bits`)
      for (let i = 0; i < perMiniblock && lengths.length < values; i++) {
        lengths.push(lengths[lengths.length - 1] + least + bitsAt(packed, i * width, width))
      }
    }
  }
  return lengths.map((length) => reader.take(length))
}

/** `width` <= 32 bits from bit `place`, least significant first. */
function bitsAt(data: Uint8Array, place: number, width: number): number {
  let value = 0
  for (let bit = 0; bit < width; bit++) value += ((data[(place + bit) >> 3] >> ((place + bit) & 7)) & 1) * 2 ** bit
  return value
}
