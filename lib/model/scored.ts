// Losses of a few positions. The others matter to the output matrix not at all, and to the last block only as keys and
// values: nothing else of them is computed.
//
// On the CPU the losses are the same bits as those of all positions. Its matrix products have another order of summation
// for up to 128 rows that something is added to, and for up to 16 rows of any kind: more are always scored here, filled
// up if need be. (Where all positions are scored, rows of logits go in parts, and the last part may be as small as that.)
import type { Device } from '../runtime/device.js'
import { attentionCached, embeddingFwd, fill, kvAppend } from '../runtime/ops.gen.js'
import type { Tensor } from '../runtime/tensor.js'
import type { Batch } from './batch.js'
import type { BatchTensors } from './forward.js'
import type { Tape } from './tape.js'

/** Numbers of scored positions differ from call to call; passes are recorded for multiples of this. */
const STEP = 64
/** Of all rows together. */
const FEWEST = 129

/** Which positions of a batch are scored, R of each row, B R in all. */
export interface Scored {
  /** R */
  count: number
  /** (B R) index of each in the batch. The last ones of a row may be there to fill it up. */
  rows: Int32Array
  /** (B R) what each predicts, -1 for those that fill a row up. */
  labels: Int32Array
}

/** The positions with labels; undefined where they are most of the batch, and choosing them would gain little. */
export function chooseScored({ rows: batch, time, labels }: Batch): Scored | undefined {
  const chosen = Array.from({ length: batch }, (_, b) => {
    const row: number[] = []
    for (let n = b * time; n < (b + 1) * time; n++) if (labels[n]! >= 0) row.push(n)
    return row
  })
  const most = chosen.reduce((count, row) => Math.max(count, row.length), FEWEST / batch)
  const count = Math.ceil(most / STEP) * STEP
  if (count > 0.75 * time) return undefined
  const rows = new Int32Array(batch * count)
  const wanted = new Int32Array(batch * count).fill(-1)
  for (const [b, row] of chosen.entries()) {
    rows.fill(b * time, b * count, (b + 1) * count)
    rows.set(row, b * count)
    for (const [i, n] of row.entries()) wanted[b * count + i] = labels[n]!
  }
  return { count, rows, labels: wanted }
}

/** Losses of scored positions as those of the whole batch (N), 0 elsewhere. */
export function scatter(nll: Float32Array, { rows, labels }: Scored, size: number): Float32Array {
  const all = new Float32Array(size)
  for (const [i, n] of rows.entries()) if (labels[i]! >= 0) all[n] = nll[i]!
  return all
}

/** Device tensors of the scored positions of B rows. */
export interface ScoredTensors {
  /** (B R) i32 */
  rows: Tensor
  /** (B R) i32 */
  labels: Tensor
  /** (B,R) i32: row of the rotation table, first and last visible position. */
  pos: Tensor
  first: Tensor
  last: Tensor
  /** (B,T) i32: 0 .. T-1 */
  slot: Tensor
}

export function allocScored(device: Device, batch: number, time: number, count: number): ScoredTensors {
  const integers = (dims: number[], name: string): Tensor => device.tensor('i32', dims, `${name} of scored positions`)
  return {
    rows: integers([batch * count], 'indices'),
    labels: integers([batch * count], 'labels'),
    pos: integers([batch, count], 'positions'),
    first: integers([batch, count], 'first visible positions'),
    last: integers([batch, count], 'last visible positions'),
    slot: integers([batch, time], 'slots'),
  }
}

/** Uploads which positions are scored; `index` is each token's row of the rotation table. */
export async function uploadScored(
  device: Device,
  tensors: ScoredTensors,
  { rows, labels }: Scored,
  { rows: batch, time, first }: Batch,
  index: Int32Array,
): Promise<void> {
  await Promise.all([
    device.upload(tensors.rows, rows),
    device.upload(tensors.labels, labels),
    device.upload(
      tensors.pos,
      rows.map((n) => index[n]!),
    ),
    device.upload(
      tensors.first,
      rows.map((n) => first[n]!),
    ),
    device.upload(
      tensors.last,
      rows.map((n) => n % time),
    ),
    device.upload(
      tensors.slot,
      Int32Array.from({ length: batch * time }, (_, n) => n % time),
    ),
  ])
}

/** x (N,C) -> the rows that are scored: (B R,C) */
export const gather = (tape: Tape, x: Tensor, { rows }: ScoredTensors): Tensor =>
  embeddingFwd(tape.recorder, { ids: rows, w: x }).y

/** q (B,R,H,D) of the scored positions, k and v (B,T,K,D) of all, unrotated -> (B,R,H,D) */
export function scoredAttention(
  { recorder }: Tape,
  q: Tensor,
  k: Tensor,
  v: Tensor,
  { cos, sin, pos }: BatchTensors,
  { slot, ...scored }: ScoredTensors,
): Tensor {
  const [batch, time, heads, width] = k.dims as [number, number, number, number]
  const room = (name: string): Tensor => {
    const tensor = recorder.scratch(k.dtype, [batch, heads, time, width], name)
    return fill(recorder, { y: tensor, value: 0 }).y
  }
  const [k_cache, v_cache] = [room('rotated keys'), room('values')]
  kvAppend(recorder, { k, v, cos, sin, pos, slot, k_cache, v_cache })
  const where = { pos: scored.pos, first: scored.first, last: scored.last }
  return attentionCached(recorder, { q, k_cache, v_cache, cos, sin, ...where, scale: 1 / Math.sqrt(q.dims[3]!) }).o
}
