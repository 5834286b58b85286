import { spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import t from 'tap'
import { ALIGNMENT, type Lifetime, planArena } from '../../lib/runtime/arena.js'
import { Device, type FileDType } from '../../lib/runtime/device.js'
import { native } from '../../lib/runtime/native.js'
import {
  add,
  attentionBwd,
  attentionFwd,
  cast,
  embeddingFwd,
  fill,
  matmulNn,
  matmulNt,
  OPS,
  rmsnormFwd,
  swigluFwd,
} from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import { Scratch, Tensor } from '../../lib/runtime/tensor.js'
import { fromBf16Bits, Random, toBf16Bits } from '../ops/harness.js'

const dry = Device.open('dry')
const aligned = (bytes: number): number => Math.ceil(bytes / ALIGNMENT) * ALIGNMENT

// ---- the arena ----

t.test('arena: seeded lifetimes never overlap, and the bounds are right', async (t) => {
  const random = new Random(1)
  for (let round = 0; round < 200; round++) {
    const lifetimes: Lifetime[] = Array.from({ length: random.int(0, 60) }, () => {
      const first = random.int(0, 40)
      return { bytes: random.int(1, random.pick([10, 300, 5000])), first, last: first + random.int(0, 15) }
    })
    const arena = planArena(lifetimes)
    const problems: string[] = []
    let bytes = 0
    lifetimes.forEach((a, i) => {
      const offset = arena.offsets[i]!
      bytes = Math.max(bytes, offset + aligned(a.bytes))
      if (offset % ALIGNMENT !== 0 || offset < 0) problems.push(`${i} lies at ${offset}`)
      lifetimes.slice(0, i).forEach((b, j) => {
        const together = a.first <= b.last && b.first <= a.last
        const apart = offset + a.bytes <= arena.offsets[j]! || arena.offsets[j]! + b.bytes <= offset
        if (together && !apart) problems.push(`${i} and ${j} overlap`)
      })
    })
    let lowerBound = 0
    let peakAt = 0
    for (let at = 0; at < 60; at++) {
      const alive = lifetimes.filter(({ first, last }) => first <= at && at <= last)
      const sum = alive.reduce((total, lifetime) => total + aligned(lifetime.bytes), 0)
      if (sum > lowerBound) [lowerBound, peakAt] = [sum, at]
    }
    t.strictSame(
      { problems, bytes: arena.bytes, lowerBound: arena.lowerBound, peakAt: arena.peakAt },
      { problems: [], bytes, lowerBound, peakAt },
      `round ${round}`,
    )
    t.ok(arena.bytes >= arena.lowerBound, 'no less than what is alive at once')
    t.ok(arena.bytes <= 2 * arena.lowerBound, 'not twice as much either')
  }
})

/** planArena as it reads: each lifetime is held against all that have their place. */
function simpleOffsets(lifetimes: readonly Lifetime[]): number[] {
  const order = lifetimes.map((_, i) => i)
  order.sort((a, b) => lifetimes[b]!.bytes - lifetimes[a]!.bytes || lifetimes[a]!.first - lifetimes[b]!.first || a - b)
  const offsets: number[] = lifetimes.map(() => 0)
  const done: number[] = []
  for (const i of order) {
    const { bytes, first, last } = lifetimes[i]!
    const beside = done.filter((j) => lifetimes[j]!.first <= last && first <= lifetimes[j]!.last)
    const ends = beside.map((j) => offsets[j]! + aligned(lifetimes[j]!.bytes))
    const free = (at: number): boolean => beside.every((j, n) => at + aligned(bytes) <= offsets[j]! || ends[n]! <= at)
    offsets[i] = Math.min(...[0, ...ends].filter(free))
    done.push(i)
  }
  return offsets
}

t.test('arena: the same places as the simple search finds', async (t) => {
  const random = new Random(2)
  for (let round = 0; round < 300; round++) {
    const end = random.int(1, random.pick([3, 40, 300]))
    const lifetimes = Array.from({ length: random.int(1, random.pick([5, 60, 200])) }, () => {
      const first = random.int(0, end)
      return { bytes: 256 * random.int(1, random.pick([2, 6, 50])), first, last: random.int(first, end) }
    })
    t.strictSame(planArena(lifetimes).offsets, simpleOffsets(lifetimes), `round ${round}`)
  }
})

t.test('arena: known optima', async (t) => {
  t.match(planArena([]), { offsets: [], bytes: 0, lowerBound: 0 })
  t.match(planArena([{ bytes: 1, first: 3, last: 3 }]), { offsets: [0], bytes: 256, lowerBound: 256, peakAt: 3 })
  // a chain: each lives with the next only
  const chain = [512, 256, 512, 256, 512].map((bytes, i) => ({ bytes, first: i, last: i + 1 }))
  t.match(planArena(chain), { offsets: [0, 512, 0, 512, 0], bytes: 768, lowerBound: 768 })
  // activations of a forward pass, freed in reverse by the backward pass, beside short-lived ones
  const layers = Array.from({ length: 8 }, (_, i) => ({ bytes: 1024, first: i, last: 15 - i }))
  const brief = Array.from({ length: 16 }, (_, i) => ({ bytes: 256, first: i, last: i }))
  t.equal(planArena([...layers, ...brief]).bytes, 8 * 1024 + 256)
})

// ---- the recorder ----

const on = (name = 'test'): Recorder => new Recorder(dry, name)

t.test('liveness: scratch is shared once it is dead, unless it is kept', async (t) => {
  const record = (keep: boolean) => {
    const recorder = on()
    const { y: a } = fill(recorder, { y: recorder.scratch('f32', [100], 'a'), value: 1 })
    const { y: b } = add(recorder, { a, b: a })
    const { y: c } = add(recorder, { a: b, b })
    const { y: d } = add(recorder, { a: c, b: c })
    return recorder.plan({ keep: keep ? [a, d] : [d] })
  }
  const shared = record(false)
  t.strictSame(
    shared.placements.map(({ offset, first, last }) => [offset, first, last]),
    [
      [0, 0, 1],
      [512, 1, 2],
      [0, 2, 3],
      [512, 3, 4],
    ],
  )
  t.equal(shared.peakBytes, 1024)
  const kept = record(true)
  t.equal(kept.placements[0]!.last, 4)
  t.equal(kept.peakBytes, 3 * 512)
  t.notOk(kept.placements.slice(1).some(({ offset }) => offset === kept.placements[0]!.offset))
  t.equal(shared.peakAt, 1)
})

t.test('liveness: views keep their storage alive, unused scratch needs no place', async (t) => {
  const recorder = on()
  const whole = recorder.scratch('f32', [4, 64], 'whole')
  recorder.scratch('f32', [1000], 'never used')
  fill(recorder, { y: whole, value: 1 })
  const { y } = add(recorder, { a: whole.rows(0, 2), b: whole.rows(2, 2) })
  const plan = recorder.plan({ keep: [y] })
  t.strictSame(
    plan.placements.map(({ bytes, last }) => [bytes, last]),
    [
      [1024, 1],
      [512, 2],
    ],
  )
})

t.test('the recorder refuses what does not fit, and says why', async (t) => {
  const recorder = on()
  const f32 = (...dims: number[]): Tensor => dry.tensor('f32', dims, 'weights')
  const bf16 = (...dims: number[]): Tensor => dry.tensor('bf16', dims, 'halves')
  const i32 = (...dims: number[]): Tensor => dry.tensor('i32', dims, 'ids')
  const missing = (value: unknown): Tensor => value as Tensor

  t.throws(() => matmulNn(recorder, { a: f32(2, 3), b: missing(undefined) }), new TypeError('matmul_nn: b is missing'))
  t.throws(
    () => matmulNn(recorder, { a: f32(2, 3), b: missing([1, 2]) }),
    new TypeError('matmul_nn: b must be a Tensor'),
  )
  t.throws(() => matmulNn(recorder, { a: f32(2, 3), b: missing(null) }), new TypeError('matmul_nn: b must be a Tensor'))
  t.throws(
    () => rmsnormFwd(recorder, { x: f32(4, 768), w: f32(512), eps: 1e-5 }),
    new RangeError('rmsnorm_fwd: w [C]: C is 512, expected 768 (weights f32 (512))'),
  )
  t.throws(
    () => matmulNt(recorder, { a: f32(2, 3), b: f32(5, 4) }),
    new RangeError('matmul_nt: b [N K]: K is 4, expected 3 (weights f32 (5,4))'),
  )
  t.throws(
    () => matmulNn(recorder, { a: f32(2, 3), b: f32(3, 4), c: f32(2, 5) }),
    new RangeError('matmul_nn: c [M N]: N is 5, expected 4 (weights f32 (2,5))'),
  )
  t.throws(
    () => add(recorder, { a: f32(8), b: bf16(8) }),
    new TypeError('add: b [N]: dtype is bf16, expected f32 (halves bf16 (8))'),
  )
  t.throws(
    () => matmulNn(recorder, { a: i32(2, 3), b: f32(3, 4) }),
    new TypeError('matmul_nn: a [M K]: dtype is i32, expected f32 or bf16'),
  )
  t.throws(() => matmulNn(recorder, { a: f32(6), b: f32(3, 4) }), {
    name: 'RangeError',
    message: /^matmul_nn: a \[M K\]: has 1 dims, expected 2/,
  })
  const attention = (D: number) =>
    attentionFwd(recorder, {
      q: f32(1, 4, 2, D),
      k: f32(1, 4, 1, D),
      v: f32(1, 4, 1, D),
      cos: f32(9, 3),
      sin: f32(9, 3),
      pos: i32(1, 4),
      first: i32(1, 4),
      scale: 1,
    })
  t.throws(() => attention(7), new RangeError('attention_fwd: D is 7, but must be divisible by 2'))
  t.throws(() => attention(8), new RangeError('attention_fwd: cos [P D/2]: D/2 is 3, expected 4 (weights f32 (9,3))'))
  const [q, k] = [f32(1, 4, 6, 8), f32(1, 4, 6, 8)]
  const gradients = (groups: number) =>
    attentionBwd(on(), {
      ...{ q, k, v: k, delta: f32(1, 6, 4), dout: q, lse: f32(1, 6, 4), cos: f32(9, 4), sin: f32(9, 4) },
      pos: i32(1, 4),
      ...{ first: i32(1, 4), scale: 1, groups },
    })
  t.throws(() => gradients(4), new RangeError('attention_bwd: H is 6, but must be divisible by groups (4)'))
  t.doesNotThrow(() => gradients(3))
  t.throws(
    () => rmsnormFwd(recorder, { x: f32(4, 8), w: f32(8), eps: NaN }),
    new TypeError('rmsnorm_fwd: eps is NaN, but must be a number'),
  )
  t.throws(
    () => swigluFwd(recorder, { gate: recorder.scratch('f32', [9], 'garbage'), up: f32(9) }),
    new Error('swiglu_fwd: gate (garbage f32 (9)) is read before anything wrote it'),
  )
  t.throws(
    () => recorder.scratch('f32', [3, 0], 'empty'),
    new RangeError('empty: dims (3,0) must be positive whole numbers'),
  )
  t.throws(() => recorder.scratch('f32', [1.5], 'half'), RangeError)
  const ids = new Tensor(new Scratch(2 ** 33, 'ids'), 0, 'i32', [2 ** 31])
  t.throws(
    () => embeddingFwd(recorder, { ids, w: f32(2, 3) }),
    new RangeError(`embedding_fwd: ids [N]: has ${2 ** 31} elements, the limit is ${2 ** 31 - 1} (${ids.describe()})`),
  )
  t.throws(() => f32(2, 3).view(7), RangeError)
  t.throws(() => f32(2, 3).rows(1, 2), RangeError)
  t.equal(recorder.commands.length, 0, 'nothing of it was recorded')
})

t.test('a bad INT names itself', async (t) => {
  const row = OPS.find(({ name }) => name === 'linear_cross_entropy_fwd')!
  for (const chunk of [0, -1, 1.5, NaN, '4', undefined]) {
    t.throws(() => on().emit(row, { chunk }), {
      message: `linear_cross_entropy_fwd: chunk is ${chunk}, but must be a whole number >= 1`,
    })
  }
})

t.test('outputs that no argument determines take the activation dtype', async (t) => {
  const x = dry.tensor('f32', [4], 'x')
  t.equal(cast(new Recorder(dry, 'test', 'bf16'), { x }).y.dtype, 'bf16')
  t.equal(cast(new Recorder(dry, 'test'), { x }).y.dtype, 'f32')
  t.equal(add(new Recorder(dry, 'test', 'bf16'), { a: x, b: x }).y.dtype, 'f32', 'a bound letter does not')
})

t.test('operations and traffic, counted by hand', async (t) => {
  const recorder = on()
  const a = dry.tensor('bf16', [3, 5], 'a')
  const b = dry.tensor('f32', [5, 7], 'b')
  const c = dry.tensor('f32', [3, 7], 'c')
  matmulNn(recorder, { a, b, add: c, c })
  t.equal(recorder.commands[0]!.flops, 2 * 3 * 5 * 7)
  t.equal(recorder.commands[0]!.traffic, 2 * 15 + 4 * 35 + 4 * 21 + 4 * 21)
  const q = dry.tensor('f32', [1, 4, 2, 6], 'q')
  const k = dry.tensor('f32', [1, 4, 1, 6], 'k')
  const angles = dry.tensor('f32', [10, 3], 'angles')
  const pos = dry.tensor('i32', [1, 4], 'pos')
  attentionFwd(recorder, { q, k, v: k, cos: angles, sin: angles, pos, first: pos, scale: 1 })
  // 1 + 2 + 3 + 4 keys, 2 heads of 6, and 2 products of 2 operations
  t.equal(recorder.commands[1]!.flops, 10 * 2 * 6 * 2 * 2)
  const read = 48 + 24 + 24 + 30 + 30 + 4 + 4
  const written = 48 + 8
  t.equal(recorder.commands[1]!.traffic, 4 * (read + written))
  const plan = recorder.plan()
  t.equal(plan.flops, 210 + 480)
  t.equal(plan.traffic, recorder.commands[0]!.traffic + recorder.commands[1]!.traffic)
})

t.test('the dry device plans more than any machine has, and does not run it', async (t) => {
  const recorder = on('vast')
  const { y } = fill(recorder, { y: recorder.scratch('f32', [30, 1_000_000_000], 'vast'), value: 1 })
  add(recorder, { a: y, b: y })
  const plan = recorder.plan()
  t.equal(plan.peakBytes, 240e9)
  await t.rejects(plan.run(), { message: /the dry device plans, it holds no data/ })
  await t.rejects(dry.upload(dry.tensor('f32', [1], 'weight'), new Float32Array(1)), {
    message: /weight: the dry device plans/,
  })
  await t.rejects(on('empty').plan().run(), { message: /plan "empty": the dry device plans, it does not run/ })
  t.ok(dry.dry)
  const before = dry.allocatedBytes
  const buffer = dry.alloc(1e15, 'a petabyte')
  t.equal(dry.allocatedBytes, before + 1e15)
  buffer.dispose()
  buffer.dispose()
  t.equal(dry.allocatedBytes, before, 'counted once')
  t.ok(dry.peakAllocatedBytes >= 1e15)
})

// ---- devices ----

t.test('device names and options', async (t) => {
  t.throws(() => Device.open('cup'), {
    name: 'RangeError',
    message: /^unknown device "cup"; did you mean "cpu"\?; known are auto, cpu/,
  })
  t.throws(() => Device.open('cuda0'), { message: /unknown device "cuda0"; did you mean "cuda/ })
  t.throws(() => Device.open('gpu-of-my-friend'), { message: /^unknown device "gpu-of-my-friend"; known are/ })
  t.throws(() => Device.open('auto:1'), RangeError)
  t.throws(() => Device.open(''), RangeError)
  t.throws(() => Device.open(7 as unknown as string), TypeError)
  for (const threads of [-1, 1.5, NaN, 2000])
    t.throws(() => Device.open('cpu', { threads }), RangeError, `threads ${threads}`)
  t.throws(() => Device.open('cpu:1'), { code: 'ERR_DEVICE_UNAVAILABLE', message: /there is one cpu device/ })
  for (const name of ['cuda', 'cuda:1', 'simt']) {
    const status = native()
      .backends()
      .find((backend) => name.startsWith(backend.name))!
    if (status.available) continue
    t.throws(() => Device.open(name), {
      code: 'ERR_DEVICE_UNAVAILABLE',
      message: new RegExp(`^device "${name}": .*unavailable: .{20}`),
    })
    t.match(status.detail, /unavailable: /)
  }
  using auto = Device.open()
  t.equal(auto.name, 'cpu')
  using one = Device.open('cpu', { threads: 1 })
  t.match(one.description, /^(baseline|avx2|avx512|amx), 1 thread$/)
})

t.test('ROPEWALK_ISA chooses the instruction set or says why not', async (t) => {
  const before = process.env['ROPEWALK_ISA']
  t.teardown(() => {
    if (before === undefined) delete process.env['ROPEWALK_ISA']
    else process.env['ROPEWALK_ISA'] = before
  })
  process.env['ROPEWALK_ISA'] = 'avx9'
  t.throws(() => Device.open('cpu'), {
    code: 'ERR_DEVICE_UNAVAILABLE',
    message: /ROPEWALK_ISA is "avx9": expected baseline, avx2, avx512 or amx/,
  })
  process.env['ROPEWALK_ISA'] = 'baseline'
  using baseline = Device.open('cpu', { threads: 2 })
  t.equal(baseline.description, 'baseline, 2 threads')
})

const device = Device.open('cpu', { threads: 2 })

t.test('upload and download, also beyond the 16 MB of one call', async (t) => {
  for (const words of [1, 1000, 4 << 20, (4 << 20) + 1, 10_000_019]) {
    const tensor = device.tensor('i32', [words], 'block')
    const data = new Int32Array(words).map((_, i) => Math.imul(i, 0x9e3779b1))
    const sent = data.slice()
    const uploaded = device.upload(tensor, sent)
    sent.fill(-1) // the copy was made already
    await uploaded
    const back = await device.download(tensor)
    t.equal(Buffer.compare(back, Buffer.from(data.buffer)), 0, `${words} words`)
    let chunks = 0
    let largest = 0
    for await (const chunk of device.downloadChunks(tensor)) {
      chunks++
      largest = Math.max(largest, chunk.length)
    }
    t.ok(largest <= 16 << 20 && chunks === Math.ceil((4 * words) / (16 << 20)), `${chunks} chunks`)
    ;(tensor.storage as unknown as Disposable & { dispose(): void }).dispose()
  }
  const matrix = device.tensor('f32', [3, 4], 'matrix')
  await device.upload(
    matrix,
    Float32Array.from({ length: 12 }, (_, i) => i),
  )
  await device.upload(matrix.rows(1, 1), Float32Array.of(-1, -2, -3, -4))
  t.strictSame([...(await device.downloadFloats(matrix))], [0, 1, 2, 3, -1, -2, -3, -4, 8, 9, 10, 11])
  t.strictSame([...(await device.downloadFloats(matrix.rows(2, 1)))], [8, 9, 10, 11])
  await t.rejects(device.upload(matrix, new Float32Array(11)), {
    name: 'RangeError',
    message: /matrix f32 \(3,4\): 44 bytes were given, expected 48/,
  })
  await t.rejects(device.downloadFloats(device.tensor('bf16', [2], 'half')), {
    name: 'TypeError',
    message: /half bf16 \(2\) is not f32/,
  })
  t.throws(() => new Tensor(matrix.storage, 4, 'f32', [12]), { name: 'RangeError', message: /exceeds 48 bytes/ })
})

t.test('allocation: what is impossible is an error with a remedy', async (t) => {
  t.throws(() => device.alloc(2 ** 50, 'a petabyte'), {
    code: 'ERR_OUT_OF_MEMORY',
    message: /^a petabyte: cpu could not allocate .*Use a shorter context/,
  })
  for (const bytes of [0, -1, 1.5, NaN, 2 ** 60]) t.throws(() => device.alloc(bytes, 'nothing'), RangeError, `${bytes}`)
  const before = device.allocatedBytes
  const buffer = device.alloc(1000, 'counted')
  t.equal(device.allocatedBytes, before + 1000)
  buffer.dispose()
  t.equal(device.allocatedBytes, before)
})

/** By the definition of the format: sign, 5 bits of exponent, 10 of fraction. */
function fromHalf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 31
  const fraction = bits & 1023
  if (exponent === 31) return fraction ? NaN : sign * Infinity
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15))
}

t.test('read: every dtype of a file into every dtype of a tensor', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'ropewalk-runtime-'))
  t.teardown(() => rmSync(folder, { recursive: true }))
  const wide = [
    0,
    -0,
    1,
    -1.5,
    NaN,
    Infinity,
    -Infinity,
    1e-45,
    1e-40,
    2 ** -126,
    3.4028234663852886e38,
    1 + 2 ** -8,
    1 + 3 * 2 ** -8,
    1e39,
    -1e300,
    5e-324,
    Math.PI,
  ]
  const repeated = (n: number): number[] => Array.from({ length: n }, (_, i) => wide[i % wide.length]!)
  const halves = Uint16Array.from({ length: 65536 * 17 }, (_, i) => i) // more than the block of a read
  const brains = Uint16Array.from({ length: 65536 }, (_, i) => i)
  const files: [FileDType, ArrayBufferView, number[]][] = [
    ['F32', Float32Array.from(repeated(1003)), repeated(1003).map(Math.fround)],
    ['F64', Float64Array.from(repeated(1003)), repeated(1003).map(Math.fround)],
    ['F16', halves, Array.from(halves, fromHalf)],
    ['BF16', brains, Array.from(brains, fromBf16Bits)],
  ]
  for (const [fileDtype, data, values] of files) {
    const offset = 13 // of the file: not aligned
    const path = join(folder, fileDtype)
    writeFileSync(
      path,
      Buffer.concat([Buffer.alloc(offset, 0xee), Buffer.from(data.buffer, 0, data.byteLength), Buffer.alloc(5, 0xee)]),
    )
    const fd = openSync(path, 'r')
    for (const dtype of ['f32', 'bf16'] as const) {
      const whole = device.tensor(dtype, [values.length + 6], 'tensor')
      await device.upload(whole, new Uint8Array(whole.bytes).fill(0x11))
      await device.read(whole.rows(3, values.length), fd, offset, fileDtype)
      const bytes = await device.download(whole)
      const got =
        dtype === 'f32'
          ? new Float32Array(bytes.buffer)
          : Float32Array.from(new Uint16Array(bytes.buffer), fromBf16Bits)
      const each = dtype === 'f32' ? 4 : 2
      const edges = [...bytes.subarray(0, 3 * each), ...bytes.subarray(-3 * each)]
      t.ok(
        edges.every((byte) => byte === 0x11),
        `${fileDtype} to ${dtype}: nothing beside it is written`,
      )
      const wrong = values.findIndex(
        (value, i) => !Object.is(got[3 + i], dtype === 'f32' ? value : fromBf16Bits(toBf16Bits(value))),
      )
      t.equal(wrong, -1, `${fileDtype} to ${dtype}: ${values[wrong]} became ${got[3 + wrong]}`)
    }
    const whole = device.tensor('f32', [values.length + 3], 'tensor')
    await t.rejects(device.read(whole, fd, offset, fileDtype), {
      code: 'ERR_DEVICE',
      message: /^the file ends at byte \d+, \d+ bytes too early/,
    })
    await t.rejects(device.read(device.tensor('i32', [2], 'ids'), fd, 0, fileDtype), {
      name: 'TypeError',
      message: /integers are not converted/,
    })
    closeSync(fd)
    await t.rejects(device.read(device.tensor('f32', [2], 'late'), fd, 0, fileDtype), {
      message: /reading failed: |too early/,
    })
  }
  const path = join(folder, 'I32')
  writeFileSync(path, Buffer.from(Int32Array.of(1, -2, 2147483647, -2147483648).buffer))
  const fd = openSync(path, 'r')
  const ids = device.tensor('i32', [3], 'ids')
  await device.read(ids, fd, 4, 'I32')
  t.strictSame([...new Int32Array((await device.download(ids)).buffer)], [-2, 2147483647, -2147483648])
  await t.rejects(device.read(device.tensor('f32', [2], 'floats'), fd, 0, 'I32'), TypeError)
  await t.rejects(device.read(ids, -1, 0, 'I32'), RangeError)
  closeSync(fd)
})

/** y = 2^n, by n additions. */
function doubling(on: Device, n: number, size = 1000): { recorder: Recorder; y: Tensor } {
  const recorder = new Recorder(on, `doubling ${n}`)
  let { y } = fill(recorder, { y: recorder.scratch('f32', [size], 'one'), value: 1 })
  for (let i = 0; i < n; i++) y = add(recorder, { a: y, b: y }).y
  return { recorder, y }
}

t.test('kept tensors survive the run, and two plans share one arena', async (t) => {
  const one = doubling(device, 5)
  const two = doubling(device, 9, 777)
  const large = one.recorder.plan({ keep: [one.y] })
  const small = two.recorder.plan({ keep: [two.y], arena: device.alloc(large.peakBytes, 'arena') })
  large.load()
  const other = two.recorder.plan({ keep: [two.y], arena: large.memory! })
  t.equal(other.memory, large.memory)
  for (let i = 0; i < 3; i++) {
    await large.run()
    t.ok((await device.downloadFloats(large.located(one.y))).every((value) => value === 32))
    await other.run()
    t.ok((await device.downloadFloats(other.located(two.y))).every((value) => value === 512))
  }
  await Promise.all([large.run(), small.run(), large.run(), small.run()])
  t.ok((await device.downloadFloats(small.located(two.y))).every((value) => value === 512))
  other.dispose()
  await large.run()
  t.ok(
    (await device.downloadFloats(large.located(one.y))).every((value) => value === 32),
    'a borrowed arena is not freed',
  )
  t.throws(() => one.recorder.plan({ arena: device.alloc(100, 'small') }), {
    name: 'RangeError',
    message: /needs an arena of 8192 bytes, was given 100/,
  })
  const stranger = doubling(device, 1).y
  t.throws(() => large.located(stranger), { message: /is not part of plan "doubling 5"/ })
  t.throws(() => new Tensor(new Scratch(4, 'four'), 0, 'f32', [2]), RangeError)
})

t.test('disposed buffers, plans and devices say so', async (t) => {
  const own = Device.open('cpu', { threads: 1 })
  const tensor = own.tensor('f32', [8], 'weights')
  const kept = own.tensor('f32', [8], 'kept')
  const recorder = new Recorder(own, 'uses weights')
  const { y } = add(recorder, { a: tensor, b: tensor })
  const late = recorder.plan({ keep: [y] })
  const plan = recorder.plan({ keep: [y] })
  await own.upload(tensor, new Float32Array(8).fill(3))
  plan.load()
  const buffer = tensor.storage as ReturnType<Device['alloc']>
  buffer.dispose()
  buffer.dispose()
  await plan.run()
  t.strictSame(
    [...(await own.downloadFloats(plan.located(y)))],
    new Array(8).fill(6),
    'a loaded plan still has its buffers',
  )
  const disposed = { message: 'weights: this buffer was disposed' }
  await t.rejects(own.upload(tensor, new Float32Array(8)), disposed)
  await t.rejects(own.download(tensor), disposed)
  await t.rejects(own.read(tensor, 0, 0, 'F32'), disposed)
  await t.rejects(late.run(), disposed)
  plan.dispose()
  plan.dispose()
  await t.rejects(plan.run(), { message: 'plan "uses weights" was disposed' })
  const loaded = doubling(own, 3).recorder.plan()
  await loaded.run()

  const busy = heavy(own, 3).run()
  t.throws(() => own.dispose(), { message: /still at work: await its promises/ })
  await busy
  own.dispose()
  own.dispose()
  const gone = { message: 'device cpu was disposed' }
  t.throws(() => own.alloc(8, 'more'), gone)
  await t.rejects(own.upload(kept, new Float32Array(8)), gone)
  await t.rejects(own.download(kept), gone)
  await t.rejects(own.read(kept, 0, 0, 'F32'), gone)
  await t.rejects(loaded.run(), gone)
  await t.rejects(doubling(own, 3).recorder.plan().run(), gone)
  own.cancel()
  loaded.dispose()
  ;(kept.storage as ReturnType<Device['alloc']>).dispose()

  using other = Device.open('cpu', { threads: 1 })
  const foreign = new Recorder(other, 'foreign')
  add(foreign, { a: device.tensor('f32', [8], 'elsewhere'), b: other.tensor('f32', [8], 'here') })
  await t.rejects(foreign.plan().run(), { message: /belongs to another device/ })
})

t.test('handles that never were: errors, no crash', async (t) => {
  const addon = native()
  const nothing = new Uint8Array(1)
  for (const handle of [0, 123456, 4294967295, -1, 1.5, NaN, '1', null, undefined, {}] as number[]) {
    t.throws(() => addon.describe(handle))
    t.throws(() => addon.alloc(handle, 8, false))
    t.throws(() => addon.cancel(handle))
    t.throws(() => addon.run(handle))
    t.throws(() => addon.upload(handle, 0, nothing))
    t.throws(() => addon.download(handle, 0, 1))
    t.throws(() => addon.read(handle, 0, 0, 0, 0, 0, 1))
    t.throws(() => addon.loadPlan(handle, 'x', new Float64Array(0), new Uint32Array(0)))
  }
  const id = addon.openDevice('cpu', 0, 1)
  const buffer = addon.alloc(id, 64, false)
  t.throws(() => addon.upload(buffer, 64, nothing), RangeError)
  t.throws(() => addon.upload(buffer, -1, nothing), RangeError)
  t.throws(() => addon.upload(buffer, 0, [1] as unknown as Uint8Array), TypeError)
  t.throws(() => addon.download(buffer, 0, 65), RangeError)
  t.throws(() => addon.download(buffer, 2 ** 52, 1), RangeError)
  t.throws(() => addon.read(buffer, 0, 7, 0, 0, 0, 1), RangeError)
  t.throws(() => addon.read(buffer, 0, 0, 0, 0, 0, 17), RangeError)
  t.equal(await addon.upload(buffer, 63, nothing), undefined)

  // Records that were damaged: whatever the decoder lets through lies inside the buffer.
  const { opcode } = OPS.find(({ name }) => name === 'add')!
  const valid = [opcode, 0, 0, 0, 1, 4, 0, 0, 0, 1, 4, 0, 16, 0, 1, 4]
  addon.freePlan(addon.loadPlan(id, 'valid', Float64Array.from(valid), Uint32Array.of(buffer)))
  const random = new Random(77)
  let refused = 0
  for (let i = 0; i < 3000; i++) {
    const words = Float64Array.from(valid.slice(0, random.next() < 0.2 ? random.int(0, valid.length) : valid.length))
    for (let changes = random.int(1, 3); changes > 0 && words.length > 0; changes--) {
      words[random.int(0, words.length - 1)] = random.pick([
        -2,
        -1,
        0,
        1,
        2,
        5,
        63,
        64,
        65,
        1e9,
        2 ** 31,
        2 ** 32,
        2 ** 53,
        2 ** 62,
        1e300,
        0.5,
        NaN,
        Infinity,
        -Infinity,
      ])
    }
    try {
      addon.freePlan(addon.loadPlan(id, 'damaged', words, Uint32Array.of(buffer)))
    } catch {
      refused++
    }
  }
  t.ok(refused > 1500 && refused < 3000, `${refused} of 3000 damaged records were refused`)
  addon.closeDevice(id)
  t.throws(() => addon.upload(buffer, 0, nothing), { message: /was disposed/ })
})

/** n products of 700 x 700 matrices. */
function heavy(on: Device, n: number) {
  const recorder = new Recorder(on, 'heavy')
  const { y: a } = fill(recorder, { y: recorder.scratch('f32', [700, 700], 'a'), value: 0.01 })
  for (let i = 0; i < n; i++) matmulNn(recorder, { a, b: a })
  return recorder.plan()
}

const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms))

t.test('cancel ends what runs and what waits, not what comes later', async (t) => {
  const plan = heavy(device, 5000)
  const quick = doubling(device, 4)
  const quickPlan = quick.recorder.plan({ keep: [quick.y] })
  const cancelled = { code: 'ERR_CANCELLED', message: 'plan "heavy" was cancelled' }
  for (let i = 0; i < 3; i++) {
    const running = t.rejects(plan.run(), cancelled, 'the running one')
    const waiting = t.rejects(quickPlan.run(), { code: 'ERR_CANCELLED' }, 'the waiting one')
    await pause(i * 30)
    const start = performance.now()
    device.cancel()
    const after = quickPlan.run()
    await Promise.all([running, waiting, after])
    t.ok(performance.now() - start < 2000, 'at once')
    t.ok(
      (await device.downloadFloats(quickPlan.located(quick.y))).every((value) => value === 16),
      'the device works on',
    )
  }
  device.cancel()
  device.cancel()
  await quickPlan.run()
  plan.dispose()
})

t.test('the event loop does not wait for a plan', async (t) => {
  const plan = heavy(device, 60)
  await plan.run()
  let best = Infinity
  let longest = 0
  for (let attempt = 0; attempt < 3 && best >= 20; attempt++) {
    const delays = monitorEventLoopDelay({ resolution: 2 })
    const start = performance.now()
    delays.enable()
    while (performance.now() - start < 1000) await plan.run()
    delays.disable()
    longest = Math.max(longest, performance.now() - start)
    best = Math.min(best, delays.percentile(99) / 1e6)
  }
  t.ok(longest >= 1000, 'there was work')
  t.ok(best < 20, `p99 of the delay is ${best.toFixed(1)} ms`)
})

// ---- threads and processes ----

const child = fileURLToPath(new URL('./child.ts', import.meta.url))

const message = (worker: Worker): Promise<unknown> =>
  new Promise((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
    worker.once('exit', (code) => reject(new Error(`the worker ended with ${code}`)))
  })

t.test('two workers at once', async (t) => {
  for (let i = 0; i < 2; i++) {
    const workers = [1, 2].map(() => new Worker(child, { workerData: 'run' }))
    const exits = workers.map((worker) => new Promise((resolve) => worker.once('exit', resolve)))
    t.strictSame(await Promise.all(workers.map(message)), ['right', 'right'])
    t.strictSame(await Promise.all(exits), [0, 0], 'they end by themselves: an idle device keeps nothing alive')
  }
})

t.test('a worker is terminated in the middle of a run', async (t) => {
  for (let i = 0; i < 3; i++) {
    const worker = new Worker(child, { workerData: 'wait' })
    t.equal(await message(worker), 'running')
    await pause(7 * i)
    const start = performance.now()
    await worker.terminate()
    t.ok(performance.now() - start < 5000, 'soon')
  }
  const { recorder, y } = doubling(device, 3)
  const plan = recorder.plan({ keep: [y] })
  await plan.run()
  t.equal((await device.downloadFloats(plan.located(y)))[0], 8, 'this thread is not affected')
})

function runChild(mode: string): Promise<{ code: number | null; signal: string | null; out: string }> {
  return new Promise((resolve, reject) => {
    const running = spawn(process.execPath, [...process.execArgv, child, mode], { stdio: ['ignore', 'pipe', 'pipe'] })
    let out = ''
    running.stdout.on('data', (data: Buffer) => (out += data.toString()))
    running.stderr.on('data', (data: Buffer) => (out += data.toString()))
    running.once('error', reject)
    running.once('close', (code, signal) => resolve({ code, signal, out }))
  })
}

t.test('a process ends in the middle of a run, and not by a signal', async (t) => {
  for (let i = 0; i < 3; i++) {
    const { code, signal, out } = await runChild('exit')
    t.strictSame({ code, signal }, { code: 7, signal: null }, `process.exit: ${out}`)
  }
  const thrown = await runChild('throw')
  t.match(thrown, { code: 1, signal: null, out: /thrown while a plan runs/ })
  const ended = await runChild('run')
  t.match(ended, { code: 0, signal: null, out: /right/ })
})

t.teardown(() => {
  device.dispose()
})
