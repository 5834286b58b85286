// bfloat16 is the upper half of a float32; JavaScript has no type for it, so it travels as a Uint16Array.
const bits = new DataView(new ArrayBuffer(4))

export function fromBfloat16(half: number): number {
  bits.setUint32(0, half << 16)
  return bits.getFloat32(0)
}

/** Rounds to nearest, ties to even. */
export function toBfloat16(value: number): number {
  bits.setFloat32(0, value)
  const word = bits.getUint32(0)
  if (Number.isNaN(value)) return (word >>> 16) | 0x40
  return ((word + 0x7fff + ((word >>> 16) & 1)) >>> 16) & 0xffff
}
