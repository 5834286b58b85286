// The peers, each where it is installed: OpenBLAS and cuBLASLt inside this process, PyTorch and transformers in a Python
// one.
import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { Device } from '../runtime/device.js'
import { native, PACKAGE_ROOT } from '../runtime/native.js'
import type { PlainDType } from '../runtime/tensor.js'
import { cublasltSide, openCublaslt } from './cublaslt.js'
import type { Side } from './measure.js'

/** What csrc/addon.cc exports for this command alone; each call blocks until it is done. */
interface BenchNative {
  blasOpen(path: string): { path: string; config: string; core: string }
  blasSgemm(ta: boolean, tb: boolean, m: number, n: number, k: number, repeats: number, threads: number): number
  copyMemory(bytes: number, repeats: number, threads: number): number
  readMemory(bytes: number, repeats: number, threads: number): number
}

const addon = (): BenchNative => native() as unknown as BenchNative

/** Copies of `bytes` bytes, read and written, by the C library. */
export function copySide(bytes: number, repeats: number, threads: number): Side {
  const run = async (): Promise<number> => addon().copyMemory(bytes, repeats, threads)
  return { name: 'copy', work: 2 * bytes * repeats, run }
}

/** Reading memory on the CPU, which is what writing a token behind a long text does. */
export function readSide(bytes: number, repeats: number, threads: number): Side {
  const run = async (): Promise<number> => addon().readMemory(bytes, repeats, threads)
  return { name: 'read', work: bytes * repeats, run }
}

/** A peer's own description of a case. */
export interface PeerCase {
  op: 'matmul' | 'attention' | 'rmsnorm' | 'swiglu' | 'cross_entropy' | 'embedding' | 'adamw' | 'copy' | 'step' | 'eval'
  [parameter: string]: unknown
}

export interface MatmulCase extends PeerCase {
  op: 'matmul'
  layout: 'nn' | 'nt' | 'tn'
  m: number
  n: number
  k: number
}

/** The peers of this machine: opens those that are there, and says of the others why they are not. */
export class Peers {
  /** One line each, for people. */
  readonly found: string[] = []
  readonly missing: string[] = []
  private blas = false
  /** Where else cuBLASLt may be; undefined where it is not there. */
  private cublaslt: readonly string[] | undefined
  private python: Python | undefined

  private constructor(private readonly device: string) {}

  static none(): Peers {
    return new Peers('cpu')
  }

  /** The peers on a device, as for Device.open. `isa`: of this processor, so that OpenBLAS is at its best. */
  static async open(isa: string, device: string): Promise<Peers> {
    const peers = new Peers(device)
    if (device === 'simt') {
      if (process.env.ROPEWALK_CUBLASLT) peers.openCublaslt([])
      peers.missing.push('on simt: it executes kernels for tests, at no speed that could be compared')
      return peers
    }
    if (device === 'cpu') peers.openBlas(isa)
    const libraries = await peers.openPython(process.env.ROPEWALK_PYTHON || 'python3')
    if (device !== 'cpu') peers.openCublaslt(libraries)
    return peers
  }

  /** The peers' ways to do `repeats` times what a case does; `work` is that of all repeats. */
  async sides(peer: PeerCase, work: number, repeats: number, threads: number): Promise<Side[]> {
    const sides: Side[] = []
    if (this.blas && peer.op === 'matmul') {
      const { layout, m, n, k } = peer as MatmulCase
      const run = async (): Promise<number> =>
        addon().blasSgemm(layout === 'tn', layout === 'nt', m, n, k, repeats, threads)
      sides.push({ name: 'openblas', work, run })
    }
    if (this.cublaslt && peer.op === 'matmul') {
      const { layout, m, n, k, dtype, sets } = peer as MatmulCase & { dtype: PlainDType; sets: number }
      const product = { layout, m, n, k, dtype }
      sides.push(await cublasltSide(this.device, this.cublaslt, product, sets, work, repeats))
    }
    try {
      return [...sides, ...(await this.pythonSides(peer, work, repeats, threads))]
    } catch (error) {
      for (const side of sides) await side.dispose?.()
      throw error
    }
  }

  close(): void {
    this.python?.close()
  }

  private async pythonSides(peer: PeerCase, work: number, repeats: number, threads: number): Promise<Side[]> {
    const sides: Side[] = []
    const { python } = this
    if (!python) return sides
    const setup = { do: 'setup', case: peer, device: this.device, threads: threads || 1 }
    const { id, variants, failed } = await python.ask<{ id: number; variants: string[]; failed: string[] }>(setup)
    if (variants.length === 0 && failed.length > 0) throw new Error(failed.join('; '))
    for (const variant of variants) {
      // the same library is a peer without PyTorch around it
      if (variant === 'cublaslt' && this.cublaslt) continue
      const run = async (): Promise<number> =>
        (await python.ask<{ seconds: number }>({ do: 'run', id, variant, repeats })).seconds
      sides.push({ name: variant, work, run, dispose: () => python.ask({ do: 'drop', id }) })
    }
    return sides
  }

  private openCublaslt(more: readonly string[]): void {
    try {
      using device = Device.open(this.device)
      this.found.push(openCublaslt(device, more))
      this.cublaslt = more
    } catch (error) {
      this.missing.push(`cuBLASLt: ${(error as Error).message}; ROPEWALK_CUBLASLT names its file`)
    }
  }

  private openBlas(isa: string): void {
    // A release that does not know a newer processor would take its AVX2 kernels, at half the speed.
    const chosen = process.env.OPENBLAS_CORETYPE
    if (isa === 'avx512' || isa === 'amx') process.env.OPENBLAS_CORETYPE ??= 'SkylakeX'
    try {
      const { path, config, core } = addon().blasOpen(process.env.ROPEWALK_OPENBLAS ?? '')
      this.blas = true
      this.found.push(
        `${/OpenBLAS [\d.]+/.exec(config)?.[0] ?? path}, ${core} kernels${chosen ? ' (OPENBLAS_CORETYPE is set)' : ''}`,
      )
    } catch (error) {
      this.missing.push(`OpenBLAS: ${(error as Error).message}`)
    }
  }

  /** Gives the files of cuBLASLt that its packages brought along. */
  private async openPython(command: string): Promise<string[]> {
    const python = new Python(command)
    try {
      const hello = { do: 'hello', device: this.device }
      type Versions = Record<'python' | 'torch' | 'transformers' | 'cuda', string | null>
      const { cublaslt, ...versions } = await python.ask<Versions & { cublaslt: string[] }>(hello)
      if (versions.torch === null) throw new Error(`Python ${versions.python} has no torch`)
      const transformers = versions.transformers === null ? '' : `, transformers ${versions.transformers}`
      const cuda = versions.cuda === null ? '' : `, ${versions.cuda}`
      this.found.push(`PyTorch ${versions.torch}${cuda}${transformers}`)
      this.python = python
      return cublaslt
    } catch (error) {
      python.close()
      this.missing.push(`PyTorch: ${(error as Error).message}; ROPEWALK_PYTHON names another Python`)
      return []
    }
  }
}

type Waiting = { resolve(answer: unknown): void; reject(error: Error): void }

/** peers.py as a child process; requests are answered in order. */
class Python {
  private readonly child: ChildProcessWithoutNullStreams
  private readonly waiting: Waiting[] = []
  private complaint = ''
  private gone: Error | undefined

  constructor(command: string) {
    this.child = spawn(command, [join(PACKAGE_ROOT, 'lib', 'bench', 'peers.py')])
    this.child.stderr.on('data', (text: Buffer) => (this.complaint = `${this.complaint}${String(text)}`.slice(-400)))
    this.child.stdin.on('error', () => undefined) // 'close' says more
    this.child.once('error', (error) => this.end(error))
    this.child.once('close', (code) => {
      const last = this.complaint.trim().split('\n').at(-1)
      this.end(new Error(`the Python process ended with code ${code}${last ? `: ${last}` : ''}`))
    })
    createInterface({ input: this.child.stdout }).on('line', (line) => {
      const answer = JSON.parse(line) as { error?: string }
      const { resolve, reject } = this.waiting.shift()!
      if (answer.error === undefined) resolve(answer)
      else reject(new Error(answer.error))
    })
  }

  ask<T>(request: object): Promise<T> {
    if (this.gone) return Promise.reject(this.gone)
    return new Promise((resolve, reject) => {
      this.waiting.push({ resolve: resolve as Waiting['resolve'], reject })
      this.child.stdin.write(`${JSON.stringify(request)}\n`)
    })
  }

  close(): void {
    this.child.stdin.end()
    this.child.kill()
  }

  private end(error: Error): void {
    this.gone ??= error
    for (const { reject } of this.waiting.splice(0)) reject(this.gone)
  }
}
