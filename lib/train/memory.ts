import type { ActivationOptions } from '../model/tape.js'
import type { PlainDType } from '../runtime/tensor.js'

/**
 * What a training step keeps in memory, and in which form. `ropewalk plan` shows what each choice costs.
 *
 * @category Training
 */
export interface MemoryOptions {
  /**
   * Layers between two kept inputs: what lies between is computed again for the backward pass, a third more work; with
   * k > 1, L / k + k inputs are kept instead of L, and all but one of k layers are computed forward a third time. 0
   * (default) keeps everything.
   */
  checkpointLayers?: number
  /** With `checkpointLayers`: attention's results are kept too and not computed again; default false. */
  keepAttention?: boolean
  /** Kept inputs go to pinned memory of the host meanwhile; needs `checkpointLayers`. Default false. */
  offloadCheckpoints?: boolean
  /** Rows of the MLP at a time; default 0: all. Changes how gradients of weights are rounded. */
  mlpRows?: number
  /**
   * Attention's backward pass rotates queries and keys of that many groups of heads, a divisor of the key/value heads,
   * one group after the other; default 1: all at once.
   */
  attentionGroups?: number
  /** Rows of logits at a time; default 0: as the device likes. Changes how gradients are rounded. */
  logitsRows?: number
  /**
   * 'float32' (default) and 'bfloat16' hold all gradients until the update. 'fused' updates each layer as soon as its
   * gradients are there, and never holds more than those: without `accumulate`; `maxGradNorm` then limits the norm of
   * each layer's gradients, not of all together, and where a gradient is not finite, layers above it have been updated.
   */
  gradients?: 'float32' | 'bfloat16' | 'fused'
  /**
   * What bfloat16 weights are updated in: 'float32' (default) keeps such a copy, 'remainder' the 16 bits that the
   * weights lack, with the same results; 'stochastic' rounds each update up or down by chance, right on average. The last
   * two are refused with float32 weights.
   */
  masters?: 'float32' | 'remainder' | 'stochastic'
  /** AdamW's moments: 'float32' (default), 'bfloat16' rounded by chance, or '8bit' in blocks of 256. */
  moments?: 'float32' | 'bfloat16' | '8bit'
  /** Moments and masters are in pinned memory of the host, and updated there over the bus; default false. */
  offloadOptimizer?: boolean
}

export type MemorySettings = Required<MemoryOptions>

export const MEMORY_DEFAULTS: MemorySettings = {
  checkpointLayers: 0,
  keepAttention: false,
  offloadCheckpoints: false,
  mlpRows: 0,
  attentionGroups: 1,
  logitsRows: 0,
  gradients: 'float32',
  masters: 'float32',
  moments: 'float32',
  offloadOptimizer: false,
}

/** Throws RangeError where the model cannot do what is asked. */
export function checkMemoryOf(model: { kvHeads: number }, { attentionGroups }: MemorySettings): void {
  if (model.kvHeads % attentionGroups !== 0) {
    throw new RangeError(
      `memory.attentionGroups is ${attentionGroups}, but must divide the model's ${model.kvHeads} key/value heads`,
    )
  }
}

/** Throws RangeError where masters are asked for that weights of this type do not have. */
export function requireMasters({ masters }: MemorySettings, dtype: PlainDType): void {
  if (masters === 'float32' || dtype !== 'f32') return
  throw new RangeError(
    `memory.masters is "${masters}", but the weights are float32: there is nothing below float32 to keep. Load them with ` +
      'dtype bfloat16, or leave masters away',
  )
}

/** The part that a pass over the model needs. */
export function activationOptions(memory: MemorySettings): ActivationOptions {
  const { checkpointLayers, keepAttention, mlpRows, attentionGroups, logitsRows, offloadCheckpoints } = memory
  return { checkpointLayers, keepAttention, mlpRows, attentionGroups, logitsRows, offload: offloadCheckpoints }
}

/** Throws RangeError where checkpoints would be further apart than the model is deep. */
export function requireLayers({ checkpointLayers }: MemorySettings, layers: number): void {
  if (checkpointLayers <= layers) return
  throw new RangeError(
    `memory.checkpointLayers is ${checkpointLayers}, but the model has ${layers} layers: at most ${layers} lie between ` +
      'two kept inputs, and 1 to 4 need the least memory',
  )
}
