import { fromBfloat16 } from '../runtime/bfloat16.js'
import { Recorder } from '../runtime/recorder.js'
import type { Tensor } from '../runtime/tensor.js'
import { allocBatch, freeTensors, readBatch, type Tokens, uploadBatch } from './batch.js'
import { type Attend, trunk } from './forward.js'
import { attention } from './layers.js'
import type { Llama } from './llama.js'
import { Tape } from './tape.js'

/** What a layer's attention is given, before positions turn it: q (B,T,H,D), k (B,T,K,D). */
export interface QueriesAndKeys {
  layer: number
  q: Float32Array
  k: Float32Array
}

/**
 * Runs tokens (B,T) through the model and gives the queries and keys of the listed layers, unrotated. They stay on the
 * device together, 4 B T (H + K) D bytes a layer; nothing after the last of the layers is computed.
 */
export async function queriesAndKeys(
  model: Llama,
  tokens: Tokens,
  layers: readonly number[],
): Promise<QueriesAndKeys[]> {
  const { device, config, weights } = model
  const batch = readBatch(tokens, config)
  return model.exclusive(async () => {
    const tensors = allocBatch(device, config, batch.rows, batch.time)
    try {
      const name = `queries and keys of ${batch.rows} x ${batch.time} tokens`
      const recorder = new Recorder(device, name, device.activationsFor(weights.dtype))
      const found = new Map<number, { q: Tensor; k: Tensor }>()
      const attend: Attend = (tape, layer, q, k, v) => {
        if (layers.includes(layer)) found.set(layer, { q, k })
        return attention(tape, q, k, v, tensors)
      }
      trunk(Tape.forward(recorder), config, weights, tensors.ids, batch.rows, attend)
      const chosen = layers.map((layer) => ({ layer, ...found.get(layer)! }))
      const plan = recorder.plan({ keep: chosen.flatMap(({ q, k }) => [q, k]), prune: true })
      try {
        plan.load()
        await uploadBatch(device, config, tensors, batch, {})
        await plan.run()
        const values = async (tensor: Tensor): Promise<Float32Array> => {
          const { buffer } = await device.download(plan.located(tensor))
          return tensor.dtype === 'f32'
            ? new Float32Array(buffer)
            : Float32Array.from(new Uint16Array(buffer), fromBfloat16)
        }
        const result: QueriesAndKeys[] = []
        for (const { layer, q, k } of chosen) result.push({ layer, q: await values(q), k: await values(k) })
        return result
      } finally {
        plan.dispose()
      }
    } finally {
      freeTensors(tensors)
    }
  })
}
