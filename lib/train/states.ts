import { PADDING, type Parameter, type Segment } from '../model/parameters.js'
import type { Buffer } from '../runtime/device.js'
import { DTYPE_BYTES, type PlainDType, Tensor } from '../runtime/tensor.js'
import type { MemorySettings } from './memory.js'

/** Kinds of states, as they are called in checkpoints. */
export type StateName = 'm' | 'v' | 'm_scale' | 'v_scale' | 'master' | 'low'

/** What the optimizer keeps for a segment, flat: (N), or for the scales of 8-bit moments (N/256). */
export type SegmentStates = Partial<Record<StateName, Tensor>>

interface State {
  dtype: PlainDType
  /** Elements of the parameters that one element of the state is for. */
  per: number
}

const MOMENTS = { float32: 'f32', bfloat16: 'bf16' } as const

/** The states of a segment. Vectors keep theirs in float32: they are few, and norms are sensitive. */
function statesOf(segment: Segment, { moments, masters }: MemorySettings): Map<StateName, State> {
  const states = new Map<StateName, State>()
  const weights = segment.of.dtype
  const vectors = segment.name === 'vectors'
  if (moments === '8bit' && !vectors) {
    for (const name of ['m', 'v'] as const) {
      states.set(name, { dtype: 'u8', per: 1 })
      states.set(`${name}_scale`, { dtype: 'f32', per: PADDING })
    }
  } else {
    const dtype = moments === '8bit' || vectors ? 'f32' : MOMENTS[moments]
    for (const name of ['m', 'v'] as const) states.set(name, { dtype, per: 1 })
  }
  if (weights === 'bf16' && masters === 'float32') states.set('master', { dtype: 'f32', per: 1 })
  if (weights === 'bf16' && masters === 'remainder') states.set('low', { dtype: 'u16', per: 1 })
  return states
}

/** Where the states of all segments lie in one buffer, and how large that is. */
export class StateLayout {
  readonly bytes: number
  private readonly places = new Map<Segment, Map<StateName, State & { offset: number; size: number }>>()

  constructor(segments: readonly Segment[], options: MemorySettings) {
    let at = 0
    for (const segment of segments) {
      const places = new Map<StateName, State & { offset: number; size: number }>()
      for (const [name, { dtype, per }] of statesOf(segment, options)) {
        const size = segment.elements / per
        places.set(name, { offset: at, size, dtype, per })
        at += Math.ceil((size * DTYPE_BYTES[dtype]) / PADDING) * PADDING
      }
      this.places.set(segment, places)
    }
    this.bytes = at
  }

  /** The states of a segment in a buffer of this layout. */
  of(segment: Segment, buffer: Buffer): SegmentStates {
    return Object.fromEntries(
      Array.from(this.places.get(segment)!, ([name, { offset, size, dtype }]) => [
        name,
        new Tensor(buffer, offset, dtype, [size]),
      ]),
    )
  }

  /** The states of one parameter, by name. Scales are (blocks), all others have the parameter's dims. */
  ofParameter(segment: Segment, parameter: Parameter, buffer: Buffer): Map<StateName, Tensor> {
    const start = segment.of.offset(parameter.name) - segment.first
    return new Map(
      Array.from(this.places.get(segment)!, ([name, { offset, dtype, per }]) => {
        const dims = per === 1 ? parameter.value.dims : [Math.ceil(parameter.value.size / per)]
        return [name, new Tensor(buffer, offset + (start / per) * DTYPE_BYTES[dtype], dtype, dims)]
      }),
    )
  }
}
