// cuBLASLt as a peer, without a GPU: cublaslt.c stands in for the library, and computes in the emulator's memory.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { type Matrices, multiply, openCublaslt, type Product } from '../../lib/bench/cublaslt.js'
import type { Layout } from '../../lib/bench/kernels.js'
import { Peers } from '../../lib/bench/peers.js'
import type { Report } from '../../lib/bench/run.js'
import { runCommand } from '../../lib/cli/commands.js'
import { toBfloat16 } from '../../lib/runtime/bfloat16.js'
import { Device } from '../../lib/runtime/device.js'
import type { Tensor } from '../../lib/runtime/tensor.js'

const folder = mkdtempSync(join(tmpdir(), 'ropewalk-cublaslt-'))
t.teardown(() => rmSync(folder, { recursive: true, force: true }))
const source = join(dirname(fileURLToPath(import.meta.url)), 'cublaslt.c')

/** Compiles the stand-in; what the compiler says where it cannot. */
function compile(name: string, ...more: string[]): string {
  const args = ['-Wall', '-Wextra', '-Wno-unused-parameter', '-Werror', '-O1', '-shared', '-fPIC', ...more]
  const { status, stderr, error } = spawnSync('cc', [...args, '-o', join(folder, name), source], { encoding: 'utf8' })
  return status === 0 ? '' : (error?.message ?? stderr)
}

const fake = join(folder, 'libcublasLt.so')
const problem = compile('libcublasLt.so')
const skip =
  (!existsSync(process.env['ROPEWALK_SIMT_LIBRARY'] ?? '') && 'skipped: ROPEWALK_SIMT_LIBRARY names no library') ||
  (spawnSync('cc', ['--version']).error && 'skipped: there is no cc')

function environment(t: Test, name: string, value: string): void {
  const before = process.env[name]
  t.teardown(() => {
    if (before === undefined) delete process.env[name]
    else process.env[name] = before
  })
  process.env[name] = value
}

const header = join(process.env.CUDA_HOME || '/usr/local/cuda', 'include')
const noHeader = { skip: !existsSync(join(header, 'cublasLt.h')) && 'skipped: there is no cublasLt.h' }

t.test('functions and numbers are those of cublasLt.h', noHeader, async (t) => {
  t.equal(compile('checked.so', '-DWITH_HEADER', `-I${header}`, `-I${join(header, 'cccl')}`), '')
})

/** Small whole numbers: sums of 24 products are exact in bf16. */
async function whole(device: Device, dtype: Product['dtype'], size: number) {
  const values = Float32Array.from({ length: size }, () => Math.floor(7 * Math.random()) - 3)
  const tensor = device.tensor(dtype, [size], 'whole numbers')
  await device.upload(tensor, dtype === 'bf16' ? Uint16Array.from(values, toBfloat16) : values)
  await device.download(tensor) // what is computed outside the emulator does not wait for copies
  return { tensor, values }
}

async function read(device: Device, tensor: Tensor): Promise<number[]> {
  const { buffer } = await device.download(tensor)
  if (tensor.dtype === 'f32') return [...new Float32Array(buffer)]
  return [...new Float32Array(Uint32Array.from(new Uint16Array(buffer), (bits) => bits << 16).buffer)]
}

function reference({ layout, m, n, k }: Product, a: Float32Array, b: Float32Array): number[] {
  const at = (i: number, l: number): number => a[layout === 'tn' ? l * m + i : i * k + l]!
  const bt = (l: number, j: number): number => b[layout === 'nt' ? j * k + l : l * n + j]!
  return Array.from({ length: m * n }, (_, x) => {
    let sum = 0
    for (let l = 0; l < k; l++) sum += at(Math.floor(x / n), l) * bt(l, x % n)
    return sum
  })
}

t.test('products of all layouts and dtypes, on each set in turn', { skip }, async (t) => {
  t.equal(problem, '')
  environment(t, 'ROPEWALK_CUBLASLT', fake)
  using device = Device.open('simt')
  t.equal(openCublaslt(device), `cuBLASLt 12.4.5 (${fake})`)
  for (const dtype of ['f32', 'bf16'] as const) {
    for (const layout of ['nn', 'nt', 'tn'] satisfies Layout[]) {
      for (const [m, n, k] of [
        [1, 1, 1],
        [5, 7, 3],
        [7, 5, 24],
        [33, 16, 17],
      ] as const) {
        const product = { layout, m, n, k, dtype }
        const sets = await Promise.all(
          [0, 1].map(async () => [
            await whole(device, dtype, m * k),
            await whole(device, dtype, k * n),
            await whole(device, dtype, m * n),
          ]),
        )
        const matrices = sets.map((set) => set.map(({ tensor }) => tensor)) as unknown as Matrices[]
        const expected = sets.map(([a, b]) => reference(product, a!.values, b!.values))
        const name = `${dtype} ${layout} ${m} x ${n} x ${k}`
        await multiply(device, product, matrices, 1)
        t.strictSame(await read(device, matrices[0]![2]), expected[0], name)
        t.strictSame(await read(device, matrices[1]![2]), [...sets[1]![2]!.values], `${name}: one set was asked for`)
        await multiply(device, product, matrices, 2)
        t.strictSame(await read(device, matrices[1]![2]), expected[1], `${name}, the second set`)
      }
    }
  }
})

t.test('what fails says so, and the device goes on', { skip }, async (t) => {
  environment(t, 'ROPEWALK_CUBLASLT', join(folder, 'nowhere.so'))
  using device = Device.open('simt')
  t.throws(() => openCublaslt(device), { message: /nowhere\.so: cannot open shared object file/ })
  const missing = await Peers.open('baseline', 'simt')
  t.match(missing.missing[0], /^cuBLASLt: .*nowhere\.so.*; ROPEWALK_CUBLASLT names its file/)
  environment(t, 'ROPEWALK_CUBLASLT', process.env['ROPEWALK_SIMT_LIBRARY']!)
  t.throws(() => openCublaslt(device), { message: /libropewalk_simt\.so has no cublasLtGetVersion/ })
  using cpu = Device.open('cpu')
  t.throws(() => openCublaslt(cpu), { message: 'backend cpu knows no peer' })

  const product = { layout: 'nn', m: 4, n: 4, k: 4, dtype: 'f32' } as const
  const matrices = await Promise.all([16, 16, 16].map(async (size) => (await whole(device, 'f32', size)).tensor))
  const sets = [matrices] as unknown as Matrices[]
  await t.rejects(multiply(device, product, sets, 1), { message: 'cuBLASLt is not open' })
  environment(t, 'ROPEWALK_CUBLASLT', fake)
  openCublaslt(device)
  await t.rejects(multiply(device, { ...product, k: 5 }, sets, 1), {
    message: 'matrix 0 has 64 bytes, and needs 80',
  })
  environment(t, 'CUBLASLT_FAKE', 'none')
  await t.rejects(multiply(device, product, sets, 1), { message: 'cuBLASLt knows no algorithm for this product' })
  environment(t, 'CUBLASLT_FAKE', 'fail')
  await t.rejects(multiply(device, product, sets, 1), { message: 'cublasLtMatmul failed: the fake failed' })
  environment(t, 'CUBLASLT_FAKE', '')
  await multiply(device, product, sets, 1)
})

t.test('ropewalk bench measures it beside ours', { skip }, async (t) => {
  environment(t, 'ROPEWALK_CUBLASLT', fake)
  const out = join(folder, 'bench.json')
  let stderr = ''
  const streams = { stdout: { write: () => true }, stderr: { write: (text: string) => (stderr += text) } }
  const args = ['bench', 'matmul,swiglu', '--device', 'simt', '--quick', '--time', '0.05', '--out', out]
  t.equal(await runCommand(args, streams), 0, stderr)
  const { cases, settings } = JSON.parse(readFileSync(out, 'utf8')) as Report
  t.strictSame(settings.peers, [`cuBLASLt 12.4.5 (${fake})`])
  t.strictSame(
    cases.map(({ stem, peers }) => [stem, ...peers.map(({ name }) => name)]),
    [...Array<string[]>(3).fill(['matmul', 'cublaslt']), ['swiglu'], ['swiglu']],
  )
  t.ok(cases.every(({ peers }) => peers.every(({ rate, ours }) => rate.median > 0 && ours.median > 0)))
})
