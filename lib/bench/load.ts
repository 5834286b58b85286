// Loading a model's file, against reading it.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, open, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parameterShapes, readConfig } from '../model/config.js'
import { Llama } from '../model/llama.js'
import type { Side } from './measure.js'

const BLOCK = 16 << 20

/** A LLaMA whose weights take about `bytes`. */
function configOf(bytes: number): Record<string, unknown> {
  const hidden = bytes < 2 ** 28 ? 256 : 1024
  const shape = { hidden_size: hidden, intermediate_size: 2.75 * hidden, vocab_size: bytes < 2 ** 28 ? 1000 : 32000 }
  const layer = (4 + 3 * 2.75) * hidden ** 2
  const layers = Math.max(1, Math.round((bytes / 4 - 2 * shape.vocab_size * hidden) / layer))
  return {
    ...{ model_type: 'llama', ...shape, num_hidden_layers: layers, num_attention_heads: hidden / 64 },
    ...{ max_position_embeddings: 2048, rms_norm_eps: 1e-5, torch_dtype: 'float32' },
  }
}

/** Writes a folder with config.json and model.safetensors (f32, random numbers); gives the size of the latter. */
export async function writeModel(dir: string, bytes: number): Promise<number> {
  const config = configOf(bytes)
  await mkdir(dir, { recursive: true })
  await writeFile(join(dir, 'config.json'), JSON.stringify(config))
  const header: Record<string, object> = {}
  let end = 0
  for (const { name, dims } of parameterShapes(readConfig(config, 'config'))) {
    const start = end
    end += 4 * dims.reduce((product, dim) => product * dim, 1)
    header[name] = { dtype: 'F32', shape: dims, data_offsets: [start, end] }
  }
  const text = Buffer.from(JSON.stringify(header))
  const padded = Buffer.concat([text, Buffer.alloc(-text.length & 7, ' ')])
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(padded.length))
  const block = Float32Array.from({ length: BLOCK / 4 }, () => 0.04 * (Math.random() - 0.5))
  const content = Buffer.from(block.buffer)
  const file = await open(join(dir, 'model.safetensors'), 'w')
  try {
    await file.writev([length, padded])
    for (let at = 0; at < end; at += BLOCK) await file.writeFile(content.subarray(0, Math.min(BLOCK, end - at)))
    return (await file.stat()).size
  } finally {
    await file.close()
  }
}

/** Llama.load, memory and checks included, and `cat file > /dev/null`, both from the page cache. */
export async function loadSides(bytes: number, device: string): Promise<Side[]> {
  const dir = await mkdtemp(join(tmpdir(), 'ropewalk-bench-'))
  const remove = (): Promise<void> => rm(dir, { recursive: true, force: true })
  try {
    const work = await writeModel(dir, bytes)
    const load = async (): Promise<number> => {
      const start = performance.now()
      const model = await Llama.load(dir, { device })
      const taken = performance.now() - start
      model.dispose()
      return taken / 1000
    }
    const cat = async (): Promise<number> => {
      const sink = await open('/dev/null', 'w')
      try {
        const start = performance.now()
        const child = spawn('cat', [join(dir, 'model.safetensors')], { stdio: ['ignore', sink.fd, 'inherit'] })
        await once(child, 'close')
        return (performance.now() - start) / 1000
      } finally {
        await sink.close()
      }
    }
    return [
      { name: 'ropewalk', work, run: load, dispose: remove },
      { name: 'cat', work, run: cat },
    ]
  } catch (error) {
    await remove()
    throw error
  }
}
