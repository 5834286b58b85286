// The CUDA library as the package ships it, built in .cmake-cuda/<version of nvcc>, and what nvcc made on the way: PTX and
// machine code of every file and architecture, which cuda-check.js reads. One compilation, of minutes, serves both.
import { execFileSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { root, run } from './setup.js'

export const NVCC = process.env.CUDACXX || 'nvcc'

/** "13.0"; undefined where there is no nvcc. */
export function nvccVersion() {
  try {
    return /release (\d+\.\d+)/.exec(execFileSync(NVCC, ['--version'], { encoding: 'utf8' }))?.[1]
  } catch {
    return undefined
  }
}

/** Builds what is missing or stale; gives the library, and the folder of intermediate files. */
export function buildCudaLibrary(env = process.env) {
  // CMake would keep what another nvcc has compiled.
  const folder = join(root, '.cmake-cuda', nvccVersion())
  const kept = join(folder, 'kept')
  mkdirSync(kept, { recursive: true })
  const flags = ['-DROPEWALK_ADDON=OFF', '-DROPEWALK_CUDA=on', `-DROPEWALK_OUT=${folder}`]
  const quiet = { stdio: ['ignore', 'ignore', 'inherit'], env }
  console.error('-- building the CUDA library')
  run('cmake', ['-S', root, '-B', folder, ...flags, `-DCMAKE_CUDA_FLAGS=--keep --keep-dir "${kept}"`], quiet)
  run('cmake', ['--build', folder, '--target', 'ropewalk_cuda', '--parallel', '2'], quiet)
  return { library: join(folder, 'libropewalk_cuda.so'), kept }
}
