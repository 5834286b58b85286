// The CUDA backend's runtime: how it is found, what is said where it cannot be used, copies, graphs, cancelling, errors.
// Without a GPU it runs on the emulator (csrc/simt), whose library ROPEWALK_SIMT_LIBRARY names.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t, { type Test } from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { Device } from '../../lib/runtime/device.js'
import { native } from '../../lib/runtime/native.js'
import { add, attentionBwd, copyStart, fill, matmulNt, matmulSwiglu, sumSquares } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import type { Tensor } from '../../lib/runtime/tensor.js'
import { Trainer } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'
import { decode } from '../ops/harness.js'

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))))
const library = process.env['ROPEWALK_SIMT_LIBRARY'] ?? ''
const noSimt = { skip: !existsSync(library) && 'skipped: ROPEWALK_SIMT_LIBRARY names no library' }

/** Sets environment variables until the test ends; undefined removes one. */
function environment(t: Test, variables: Record<string, string | undefined>): void {
  for (const [name, value] of Object.entries(variables)) {
    const before = process.env[name]
    t.teardown(() => {
      if (before === undefined) delete process.env[name]
      else process.env[name] = before
    })
    if (value === undefined) delete process.env[name]
    else process.env[name] = value
  }
}

const folder = mkdtempSync(join(tmpdir(), 'ropewalk-cuda-'))
t.teardown(() => rmSync(folder, { recursive: true }))

// ---- finding the library ----

t.test('a library that is missing, damaged, foreign or of another version is refused with the remedy', async (t) => {
  const foreign = (process.report.getReport() as unknown as { sharedObjects: string[] }).sharedObjects.find((path) =>
    path.includes('libgcc_s'),
  )!
  const file = (name: string, content: string | Buffer): string => {
    writeFileSync(join(folder, name), content)
    return join(folder, name)
  }
  const bytes = readFileSync(foreign)
  const cases: [string, RegExp][] = [
    ['/nowhere/lib.so', /there is no \/nowhere\/lib\.so, which ROPEWALK_CUDA_LIBRARY names/],
    [file('text.so', 'not a library'), /text\.so is damaged: it is no ELF file/],
    [
      file('half.so', bytes.subarray(0, bytes.length >> 1)),
      new RegExp(`half\\.so is damaged: it has ${bytes.length >> 1} of \\d+ bytes`),
    ],
    [foreign, /is not a backend of ropewalk/],
  ]
  for (const [path, message] of cases) {
    environment(t, { ROPEWALK_CUDA_LIBRARY: path })
    t.throws(() => Device.open('cuda'), { code: 'ERR_DEVICE_UNAVAILABLE', message }, path)
    t.throws(() => Device.open('cuda'), { message: /^device "cuda": CUDA backend unavailable: / })
    using auto = Device.open()
    t.equal(auto.name, 'cpu', 'auto goes on without it')
    t.match(auto.fallback, message, 'and says why')
  }
  environment(t, { ROPEWALK_CUDA_LIBRARY: undefined })
  if (!['build/Release', 'prebuilds/linux-x64'].some((at) => existsSync(join(root, at, 'libropewalk_cuda.so')))) {
    t.throws(() => Device.open('cuda'), { message: /no .*\/libropewalk_cuda\.so\. .*npx ropewalk build/ })
  }
  t.equal(Device.open('cpu').fallback, undefined)
})

const noCompiler = { skip: spawnSync('c++', ['--version']).status !== 0 && 'skipped: there is no c++' }

t.test('a library of another ABI or op table is refused', noCompiler, async (t) => {
  for (const [name, abi, hash, message] of [
    ['abi', 'RW_BACKEND_ABI + 1', 'rw::table_hash', /abi\.so speaks ABI \d+, this addon \d+\. .*another version/],
    ['table', 'RW_BACKEND_ABI', 'rw::table_hash + 1', /table\.so was built from another op table\. .*reinstall/],
  ] as const) {
    const path = join(folder, `${name}.so`)
    const source = `#include "backend.h"\n#include "ops.h"\nstatic rw_backend b = {${abi}, ${hash}, "${name}"};
      extern "C" const rw_backend* ropewalk_backend() { return &b; }\n`
    const args = ['-std=c++17', '-shared', '-fPIC', `-I${join(root, 'csrc')}`, '-xc++', '-', '-o', path]
    const { status, stderr } = spawnSync('c++', args, { input: source, encoding: 'utf8' })
    t.equal(status, 0, stderr)
    environment(t, { ROPEWALK_CUDA_LIBRARY: path })
    t.throws(() => Device.open('cuda'), { code: 'ERR_DEVICE_UNAVAILABLE', message })
  }
})

// ---- finding a GPU ----

t.test('no driver, an old one, no GPU, an old one, too high a number: each says what to do', noSimt, async (t) => {
  for (const [machine, message] of [
    ['driver=0', /finds no NVIDIA driver \(libcuda\.so\.1\)\. Install driver 580 or later.*--gpus all/],
    [
      'driver=12020',
      /driver.* supports CUDA 12\.2, this library needs CUDA 13\.0 \(driver 580 or later\)\. Update.*cuda-compat-13-0/,
    ],
    ['devices=0', /finds no GPU.*nvidia-smi/],
    ['capability=75', /GPU 0 \(.*\) has compute capability 7\.5, the kernels need 8\.0/],
  ] as const) {
    environment(t, { ROPEWALK_SIMT_MACHINE: machine })
    t.throws(() => Device.open('simt'), { code: 'ERR_DEVICE_UNAVAILABLE', message }, machine)
    t.throws(() => Device.open('simt'), { message: /CUDA backend unavailable: / })
  }
  environment(t, { ROPEWALK_SIMT_MACHINE: 'devices=0', CUDA_VISIBLE_DEVICES: '7' })
  t.throws(() => Device.open('simt'), { message: /finds no GPU \(CUDA_VISIBLE_DEVICES is "7"\)/ })
  environment(t, { ROPEWALK_SIMT_MACHINE: 'devices=2', CUDA_VISIBLE_DEVICES: undefined })
  t.throws(() => Device.open('simt:2'), { message: /there is no GPU 2: this process sees 0 to 1/ })
  using second = Device.open('simt:1')
  t.equal(second.name, 'simt:1')
})

t.test('auto is the GPU where there is one', noSimt, async (t) => {
  environment(t, { ROPEWALK_CUDA_LIBRARY: library, ROPEWALK_SIMT_MACHINE: 'devices=2,memory=36554432' })
  using device = Device.open()
  t.equal(device.name, 'cuda')
  t.equal(device.fallback, undefined)
  t.equal(device.workspaceBytes, Device.open('dry:cuda').workspaceBytes, 'as planned')
  t.match(device.description, /, sm_80 \(kernels of sm_80\), 34\.9 MiB$/)
  t.same(device.memory(), { freeBytes: 36554432, totalBytes: 36554432 })
  device.tensor('f32', [1000], 'block')
  t.same(device.memory(), { freeBytes: 2996000, totalBytes: 36554432 })
  const list = native().backends()
  t.strictSame(
    list.filter(({ available }) => available).map(({ name }) => name),
    ['cpu', 'cuda', 'cuda:1', 'simt'],
  )
  t.match(list[1], { memory: { totalBytes: 36554432 } })
  t.equal(list[0]!.memory, undefined)
  t.equal(Device.open('cpu').memory(), undefined)
  t.equal(Device.open('dry').memory(), undefined)
  environment(t, { ROPEWALK_SIMT_MACHINE: 'driver=12020' })
  using cpu = Device.open()
  t.equal(cpu.name, 'cpu')
  t.match(cpu.fallback, /supports CUDA 12\.2/)
})

// ---- copies ----

t.test('copies arrive whole, at every size around the staging buffers', noSimt, async (t) => {
  using device = Device.open('simt')
  const piece = 1 << 20 // words in one staging buffer
  for (const words of [1, 7, piece - 1, piece, piece + 1, 2 * piece, 3 * piece + 5, 5 * piece - 1]) {
    const tensor = device.tensor('i32', [words], 'block')
    const data = new Int32Array(words).map((_, i) => Math.imul(i, 0x9e3779b1))
    // a second upload right behind the first must not overtake its staging buffers
    await Promise.all([device.upload(tensor, new Int32Array(words)), device.upload(tensor, data)])
    t.equal(Buffer.compare(await device.download(tensor), Buffer.from(data.buffer)), 0, `${words} words`)
  }
})

// ---- plans ----

/** 1 + 1 + ... in `count` additions, so that several graphs follow each other, to an input that may change. */
function sums(device: Device, count: number, size = 1000) {
  const input = device.tensor('f32', [size], 'input')
  const recorder = new Recorder(device, 'sums')
  const one = fill(recorder, { y: recorder.scratch('f32', [size], 'one'), value: 1 }).y
  let y = input
  for (let i = 0; i < count; i++) y = add(recorder, { a: y, b: one }).y
  // the last of them needs scratch memory, which no capture may allocate
  sumSquares(recorder, { x: y })
  const plan = recorder.plan({ keep: [y] })
  const run = async (value: number): Promise<Float32Array> => {
    await device.upload(input, new Float32Array(size).fill(value))
    await plan.run()
    return device.downloadFloats(plan.located(y))
  }
  return { plan, run, input }
}

t.test('replayed graphs compute what the first run did, on what is in memory now', noSimt, async (t) => {
  for (const graphs of ['1', '0']) {
    environment(t, { ROPEWALK_CUDA_GRAPHS: graphs })
    using device = Device.open('simt')
    for (const count of [1, 30, 31, 32, 63, 64, 100]) {
      const { plan, run } = sums(device, count)
      for (const value of [0, 5, -3, 1000]) {
        const result = await run(value)
        t.ok(
          result.every((x) => x === value + count),
          `${count} additions to ${value}`,
        )
      }
      plan.dispose()
    }
  }
})

t.test('two plans in turn, one freed between runs of the other', noSimt, async (t) => {
  using device = Device.open('simt')
  const first = sums(device, 40)
  for (let round = 0; round < 4; round++) {
    const second = sums(device, 35)
    for (let run = 0; run < 3; run++) {
      t.equal((await second.run(run))[0], run + 35)
      t.equal((await first.run(round))[999], round + 40)
    }
    second.plan.dispose()
  }
})

t.test('cancelling ends a run, captured or not, and the next one is whole', noSimt, async (t) => {
  for (const runsBefore of [0, 1, 2]) {
    using device = Device.open('simt')
    const { plan, run } = sums(device, 400, 50_000)
    for (let i = 0; i < runsBefore; i++) await run(0)
    const cancelled = t.rejects(run(0), { code: 'ERR_CANCELLED' }, `after ${runsBefore} runs`)
    await new Promise((resolve) => setTimeout(resolve, 30))
    device.cancel()
    await cancelled
    for (let i = 0; i < 3; i++) t.equal((await run(7))[49_999], 407)
    plan.dispose()
  }
})

// ---- errors ----

t.test('a failing operation is named', noSimt, async (t) => {
  using device = Device.open('simt')
  const recorder = new Recorder(device, 'broken')
  const i32 = device.tensor('i32', [4], 'integers')
  fill(recorder, { y: device.tensor('f32', [4], 'x'), value: 1 })
  recorder.commands.push({ ...recorder.commands[0]!, values: [i32, 1] })
  await t.rejects(recorder.plan().run(), {
    name: 'RopewalkError',
    code: 'ERR_DEVICE',
    message: /^fill \(#1 of plan "broken"\): /,
  })
  t.equal((await sums(device, 3).run(1))[0], 4, 'the device goes on')
})

t.test('an illegal access ends the device: every later call says so at once', noSimt, async (t) => {
  const illegal = 'an illegal memory access was encountered \\(cudaErrorIllegalAddress\\)'
  const plan = 'plan "sums", ROPEWALK_DEBUG=1 tells which: .*'
  const end = 'This device cannot be used any more: restart the process$'
  for (const [fault, debug, where] of [
    [3, '1', 'add \\(#2 of plan "sums"\\): .*'],
    [3, undefined, `one of the operations fill \\(#0\\) to add \\(#31\\) of ${plan}`],
    // the third run is the second one's graphs: launch 290 is its 88th
    [290, undefined, `one of the operations add \\(#32\\) to add \\(#95\\) of ${plan}`],
  ] as const) {
    environment(t, { ROPEWALK_SIMT_MACHINE: `fault=${fault}`, ROPEWALK_DEBUG: debug })
    const device = Device.open('simt')
    const { run, input } = sums(device, 100)
    const message = new RegExp(`^${where}${illegal}.*${end}`)
    await t.rejects(
      (async () => {
        for (let i = 0; i < 4; i++) await run(0)
      })(),
      { code: 'ERR_DEVICE', message },
      `launch ${fault}`,
    )
    await t.rejects(run(0), { message }, 'another run')
    await t.rejects(device.download(input), { message }, 'a download')
    await t.rejects(device.upload(input, new Float32Array(1000)), { message }, 'an upload')
    t.throws(() => device.alloc(4, 'block'), { message: new RegExp(illegal) }, 'an allocation')
    t.throws(() => device.memory(), { message })
    device.dispose()
  }
  environment(t, { ROPEWALK_SIMT_MACHINE: undefined, ROPEWALK_DEBUG: undefined })
  Device.open('simt').dispose()
})

t.test('out of memory: what was asked for, what is free, what helps; and the device goes on', noSimt, async (t) => {
  environment(t, { ROPEWALK_SIMT_MACHINE: 'memory=44040192' })
  using device = Device.open('simt')
  const block = device.alloc(8 << 20, 'weights')
  t.throws(() => device.alloc(3 << 20, 'activations'), {
    code: 'ERR_OUT_OF_MEMORY',
    message:
      /^activations: simt could not allocate 3145728 bytes \(3\.0 MiB\) .*40\.0 MiB\) are in use by this model\): out of memory: 3\.0 MiB were asked for, 2\.0 MiB of 42\.0 MiB are free\. Use a shorter context, fewer rows, or dtype bfloat16$/,
  })
  block.dispose()
  t.equal((await sums(device, 40).run(2))[0], 42)
})

t.test(
  'a card with less shared memory takes smaller tiles, or says what it lacks; and the device goes on',
  noSimt,
  async (t) => {
    environment(t, { ROPEWALK_SIMT_MACHINE: 'smem=101376,capability=86' })
    using device = Device.open('simt')
    const ones = (recorder: Recorder, dims: number[], dtype: 'f32' | 'bf16' = 'f32'): Tensor =>
      fill(recorder, { y: recorder.scratch(dtype, dims, 'ones'), value: 1 }).y
    // the largest tile, which does not fit, would be the quickest
    for (const [m, n, k] of [
      [256, 512, 64],
      [64, 64, 64],
    ] as const) {
      const recorder = new Recorder(device, 'product')
      const { c } = matmulNt(recorder, { a: ones(recorder, [m, k], 'bf16'), b: ones(recorder, [n, k], 'bf16') })
      const gated = matmulSwiglu(recorder, {
        ...{ a: ones(recorder, [m, k], 'bf16'), w_gate: ones(recorder, [n, k], 'bf16') },
        w_up: ones(recorder, [n, k], 'bf16'),
      })
      const plan = recorder.plan({ keep: [c, gated.up] })
      await plan.run()
      for (const y of [c, gated.up]) {
        const values = decode(y.dtype as 'f32' | 'bf16', await device.download(plan.located(y)))
        t.ok(values.length === m * n && values.every((value) => value === 64), `${m} x ${n}: all are 64`)
      }
      plan.dispose()
    }

    const { run } = sums(device, 100)
    t.equal((await run(7))[0], 107)
    // A copy is under way when the backward pass of f32 heads of 128 finds no room.
    const failing = new Recorder(device, 'failing')
    const [B, T, H, D] = [1, 8, 1, 128]
    const x = ones(failing, [B, T, H, D])
    copyStart(failing, { x, y: failing.scratch('f32', [B, T, H, D], 'host', true) })
    const index = (dims: number[]): Tensor => device.tensor('i32', dims, 'zeros')
    const [lse, table] = [ones(failing, [B, H, T]), ones(failing, [T, D / 2])]
    attentionBwd(failing, {
      ...{ q: x, k: x, v: x, dout: x, delta: lse, lse, cos: table, sin: table },
      ...{ pos: index([B, T]), first: index([B, T]), groups: 1, scale: 1 },
    })
    const plan = failing.plan()
    for (let run = 0; run < 2; run++) {
      await t.rejects(plan.run(), {
        code: 'ERR_DEVICE',
        message:
          /^attention_bwd \(#\d+ of plan "failing"\): it needs \d{6} bytes of shared memory for a block, more than this GPU has: use dtype bfloat16/,
      })
    }
    for (let i = 0; i < 3; i++) t.equal((await run(i))[0], i + 100, 'what comes after, a capture first')
  },
)

// ---- dtypes of activations ----

t.test('bf16 models keep bf16 activations on a GPU only; plans know', noSimt, async (t) => {
  using cpu = Device.open('cpu')
  using simt = Device.open('simt')
  const dry = Device.open('dry:cuda')
  t.strictSame(
    [cpu, Device.open('dry'), simt, dry].map((device) => [device.activationsFor('f32'), device.activationsFor('bf16')]),
    [
      ['f32', 'f32'],
      ['f32', 'f32'],
      ['f32', 'bf16'],
      ['f32', 'bf16'],
    ],
  )
  t.equal(cpu.planner().name, 'dry')
  t.equal(simt.planner().name, 'dry:cuda')
  const planned = async (device: string): Promise<number> => {
    using model = await Llama.load(join(fixtures, 'mha-bf16'), { device })
    using trainer = new Trainer(model, { context: 32 })
    return trainer.plan().activationBytes
  }
  t.equal(await planned('dry:cuda'), await planned('simt'))
  t.equal(await planned('dry'), await planned('cpu'))
  t.ok((await planned('dry:cuda')) < (await planned('dry')))
})

t.test('steps of training on it go where those of the CPU go', noSimt, async (t) => {
  const losses = async (device: string, graphs: string): Promise<number[]> => {
    environment(t, { ROPEWALK_CUDA_GRAPHS: graphs })
    using model = await Llama.load(join(fixtures, 'mha-f32'), { device })
    using trainer = new Trainer(model, { learningRate: 1e-3, warmupSteps: 0, maxGradNorm: 1 })
    const tokens = [Array.from({ length: 24 }, (_, i) => (i * i) % 50)]
    const found: number[] = []
    for (let step = 0; step < 4; step++) found.push((await trainer.step(tokens)).loss)
    return found
  }
  const [cpu, simt, eager] = [await losses('cpu', '1'), await losses('simt', '1'), await losses('simt', '0')]
  t.strictSame(simt, eager, 'graphs change no bit')
  t.ok(cpu[3]! < cpu[0]!, `${cpu}`)
  cpu.forEach((loss, step) => t.ok(Math.abs(simt[step]! / loss - 1) < 1e-5, `step ${step}: ${simt[step]} and ${loss}`))
})
