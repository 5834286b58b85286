// The CUDA library as the package ships it, built in .cmake-cuda, and what nvcc made on the way: PTX and machine code of
// every file and architecture, which cuda-check.js reads. One compilation, of minutes, serves both.
import { execFileSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { root, run } from './setup.js'

const FOLDER = join(root, '.cmake-cuda')
const KEPT = join(FOLDER, 'kept')
const NVCC = process.env.CUDACXX || 'nvcc'

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
  mkdirSync(KEPT, { recursive: true })
  const flags = ['-DROPEWALK_ADDON=OFF', '-DROPEWALK_CUDA=on', `-DROPEWALK_OUT=${FOLDER}`]
  const quiet = { stdio: ['ignore', 'ignore', 'inherit'], env }
  console.error('-- building the CUDA library')
  run('cmake', ['-S', root, '-B', FOLDER, ...flags, `-DCMAKE_CUDA_FLAGS=--keep --keep-dir ${KEPT}`], quiet)
  run('cmake', ['--build', FOLDER, '--target', 'ropewalk_cuda', '--parallel', '2'], quiet)
  return { library: join(FOLDER, 'libropewalk_cuda.so'), kept: KEPT }
}
