/**
 * The compact protocol of Apache Thrift, as parquet files carry it, read with bounds: numbers of at most 64 bits, lists
 * no longer than the bytes that are left, a limit on nesting. Fields come as a map from field number to value.
 */
export type ThriftStruct = Map<number, ThriftValue>
export type ThriftValue = boolean | number | bigint | Uint8Array | ThriftValue[] | ThriftStruct

const maxDepth = 16

export class ThriftReader {
  constructor(
    readonly bytes: Uint8Array,
    public offset = 0,
  ) {}

  struct(depth = 0): ThriftStruct {
    if (depth > maxDepth) throw new RangeError(`nested deeper than ${maxDepth} levels`)
    const fields: ThriftStruct = new Map()
    let id = 0
    for (;;) {
      const head = this.byte()
      const type = head & 15
      if (type === 0) return fields
      id = head >> 4 === 0 ? Number(this.zigzag()) : id + (head >> 4)
      // a boolean field has its value in its type
      fields.set(id, type <= 2 ? type === 1 : this.value(type, depth))
    }
  }

  private value(type: number, depth: number): ThriftValue {
    if (type <= 3) return this.byte()
    if (type <= 5) return Number(this.zigzag())
    if (type === 6) return this.zigzag()
    if (type === 7) return this.take(8)
    if (type === 8) return this.take(Number(this.varint()))
    if (type === 9 || type === 10) return this.list(depth)
    if (type === 12) return this.struct(depth + 1)
    throw new RangeError(`unknown thrift type ${type} at byte ${this.offset}`)
  }

  private list(depth: number): ThriftValue[] {
    const head = this.byte()
    const count = head >> 4 === 15 ? Number(this.varint()) : head >> 4
    // every element takes at least a byte
    if (count > this.bytes.length - this.offset) {
      throw new RangeError(`a list of ${count} elements in ${this.bytes.length - this.offset} bytes`)
    }
    return Array.from({ length: count }, () => this.value(head & 15, depth + 1))
  }

  take(length: number): Uint8Array {
    if (!(length >= 0 && length <= this.bytes.length - this.offset)) {
      throw new RangeError(`${length} bytes at byte ${this.offset}, but ${this.bytes.length} are there`)
    }
    this.offset += length
    return this.bytes.subarray(this.offset - length, this.offset)
  }

  private byte(): number {
    if (this.offset >= this.bytes.length) throw new RangeError(`the data ends at byte ${this.offset}`)
    return this.bytes[this.offset++]
  }

  varint(): bigint {
    let value = 0n
    for (let shift = 0n; shift < 70n; shift += 7n) {
      const byte = this.byte()
      value |= BigInt(byte & 127) << shift
      if (byte < 128) return value
    }
    throw new RangeError(`a number of more than 64 bits at byte ${this.offset}`)
  }

  zigzag(): bigint {
    const value = this.varint()
    return (value >> 1n) ^ -(value & 1n)
  }
}
