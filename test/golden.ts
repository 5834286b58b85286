// The golden fixtures (test/fixtures/README.md): checkpoints with results computed by Hugging Face transformers.
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { openSafetensors } from '../lib/files/safetensors.js'

export const fixtures = fileURLToPath(new URL('./fixtures', import.meta.url))

export const caseNames: string[] = JSON.parse(readFileSync(join(fixtures, 'manifest.json'), 'utf8')).cases

export interface GoldenTensor {
  dims: number[]
  data: Float32Array | Int32Array
}

export interface Golden {
  dir: string
  /** golden.json, as it is. */
  json: any
  names: string[]
  floats(name: string): Promise<{ dims: number[]; data: Float32Array }>
  ints(name: string): Promise<{ dims: number[]; data: Int32Array }>
  close(): Promise<void>
}

export async function openGolden(name: string): Promise<Golden> {
  const dir = join(fixtures, name)
  const file = await openSafetensors(join(dir, 'golden.safetensors'))
  const bytes = async (tensor: string) => ({
    dims: file.tensors.get(tensor)!.dims,
    buffer: Uint8Array.from(await file.read(tensor)).buffer,
  })
  return {
    dir,
    json: JSON.parse(readFileSync(join(dir, 'golden.json'), 'utf8')),
    names: [...file.tensors.keys()],
    floats: async (tensor) => {
      const { dims, buffer } = await bytes(tensor)
      return { dims, data: new Float32Array(buffer) }
    },
    ints: async (tensor) => {
      const { dims, buffer } = await bytes(tensor)
      return { dims, data: new Int32Array(buffer) }
    },
    close: () => file.close(),
  }
}

/** |a - b| / |b| in the 2-norm. */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let difference = 0
  let size = 0
  for (let i = 0; i < b.length; i++) {
    difference += (a[i]! - b[i]!) ** 2
    size += b[i]! ** 2
  }
  return Math.sqrt(difference / size)
}

export const norm = (a: ArrayLike<number>): number => Math.sqrt(Array.from(a).reduce((sum, x) => sum + x * x, 0))
