// Weights that are used in place, in their files (csrc/mapping.cc), against weights that are read.
import { spawn } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { Worker } from 'node:worker_threads'
import t from 'tap'
import { openSafetensors } from '../../lib/files/safetensors.js'
import { Llama } from '../../lib/model/llama.js'
import type { LoadOptions } from '../../lib/model/load.js'
import { Device } from '../../lib/runtime/device.js'
import { native } from '../../lib/runtime/native.js'
import { cast, fill } from '../../lib/runtime/ops.gen.js'
import { Recorder } from '../../lib/runtime/recorder.js'
import { Tensor } from '../../lib/runtime/tensor.js'
import { Trainer } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'

const place = fs.mkdtempSync(join(tmpdir(), 'ropewalk-load-'))
t.teardown(() => fs.rmSync(place, { recursive: true, force: true }))

const F32 = 'gqa-linear4-f32'
const BF16 = 'mha-bf16'
const SHARDS = 'sharded-tied-linear8'
const tokens = [Array.from({ length: 40 }, (_, i) => (i * 37 + 11) % 300)]

const load = (dir: string, options: LoadOptions = {}) => Llama.load(dir, { device: 'cpu', ...options })

let copies = 0
/** A copy of a fixture that a test may change. */
function copy(name: string): string {
  const dir = join(place, `${name}-${copies++}`)
  fs.cpSync(join(fixtures, name), dir, { recursive: true })
  return dir
}

const weightFiles = (dir: string): string[] =>
  fs.readdirSync(dir).flatMap((name) => (/^model.*\.safetensors$/.test(name) ? [join(dir, name)] : []))
const fileBytes = (dir: string): number => weightFiles(dir).reduce((sum, path) => sum + fs.statSync(path).size, 0)

const bits = (array: ArrayBufferView): string =>
  Buffer.from(array.buffer, array.byteOffset, array.byteLength).toString('base64')

/** All weights, logits, gradients and a text of a model, bit by bit. */
async function everything(model: Llama): Promise<string[]> {
  const result = [bits((await model.logits(tokens)).data)]
  for (const [name, { data }] of await model.gradients(tokens)) result.push(`${name} ${bits(data)}`)
  for (const { name } of model.parameters()) result.push(bits((await model.read(name)).data))
  for await (const { id } of model.generate({ prompt: [1, 5, 9], maxTokens: 8, stopIds: [] })) result.push(String(id))
  return result
}

t.test('mapped and read weights give the same bits', async (t) => {
  for (const name of [F32, BF16, SHARDS]) {
    const dir = join(fixtures, name)
    using mapped = await load(dir)
    using read = await load(dir, { map: false })
    t.same([mapped.weights.mapped, read.weights.mapped], [true, false])
    t.equal(mapped.device.mappedBytes, fileBytes(dir), `${name}: its files are mapped`)
    t.equal(mapped.device.allocatedBytes, 0, 'and nothing is allocated')
    t.equal(read.device.mappedBytes, 0)
    t.ok(read.device.allocatedBytes > 0)
    t.same(await everything(mapped), await everything(read), name)
  }
})

/** Writes `extra` spaces behind the header of a file: what comes after moves by as many bytes. */
function shift(path: string, extra: number): void {
  const bytes = fs.readFileSync(path)
  const length = Number(bytes.readBigUInt64LE(0))
  const header = bytes.subarray(8, 8 + length)
  bytes.writeBigUInt64LE(BigInt(length + extra))
  fs.writeFileSync(
    path,
    Buffer.concat([bytes.subarray(0, 8), header, Buffer.alloc(extra, ' '), bytes.subarray(8 + length)]),
  )
}

t.test('what cannot be used in place is read', async (t) => {
  for (const name of [F32, BF16]) {
    using read = await load(join(fixtures, name), { map: false })
    const want = await everything(read)
    for (let extra = 1; extra <= 8; extra++) {
      const dir = copy(name)
      shift(join(dir, 'model.safetensors'), extra)
      using model = await load(dir)
      t.equal(model.weights.mapped, extra % (name === F32 ? 4 : 2) === 0, `${name}, ${extra} bytes further on`)
      t.same(await everything(model), want)
    }
  }
  const shards = copy(SHARDS)
  shift(weightFiles(shards)[1]!, 1)
  using odd = await load(shards)
  t.equal(odd.weights.mapped, false, 'one tensor that is misaligned is enough')
  t.equal(odd.device.mappedBytes, 0, 'nothing stays mapped')
  for (const [name, dtype] of [
    [F32, 'bfloat16'],
    [BF16, 'float32'],
  ] as const) {
    using model = await load(join(fixtures, name), { dtype })
    t.equal(model.weights.mapped, false, `${name} as ${dtype}`)
  }
  using dry = await load(join(fixtures, F32), { device: 'dry' })
  t.equal(dry.device.mappedBytes, 0)
  await t.rejects(load(join(fixtures, F32), { map: 1 as never }), { name: 'TypeError', message: /map is 1/ })
})

t.test('NaN and infinity are found and named, as when weights are read', async (t) => {
  for (const [name, value] of [
    [F32, [0, 0, 0xc0, 0x7f]],
    [BF16, [0x80, 0xff]],
    [SHARDS, [0, 0, 0x80, 0x7f]],
  ] as const) {
    for (const path of weightFiles(join(fixtures, name))) {
      const file = await openSafetensors(path)
      const inside = [...file.tensors.values()]
      for (const i of new Set([0, inside.length >> 1, inside.length - 1])) {
        const { name: tensor, offset, bytes } = inside[i]!
        for (const element of [0, bytes / value.length - 1]) {
          const dir = copy(name)
          const bad = join(dir, path.slice(path.lastIndexOf('/') + 1))
          const content = fs.readFileSync(bad)
          content.set(value, offset + element * value.length)
          fs.writeFileSync(bad, content)
          const message = new RegExp(`${bad}: ${tensor} has (NaN|-?Infinity) at element ${element}:`)
          for (const map of [true, false]) {
            await t.rejects(load(dir, { map }), { code: 'ERR_NOT_FINITE', message }, `${name} ${tensor}`)
          }
          fs.rmSync(dir, { recursive: true })
        }
      }
      await file.close()
    }
  }
})

t.test('progress comes to its end', async (t) => {
  for (const name of [F32, SHARDS]) {
    const ends: number[] = []
    for (const map of [true, false]) {
      const seen: { bytes: number; totalBytes: number }[] = []
      ;(await load(join(fixtures, name), { map, onProgress: (done) => seen.push(done) })).dispose()
      t.ok(seen.every(({ bytes }, i) => i === 0 || bytes > seen[i - 1]!.bytes))
      t.equal(seen.at(-1)!.bytes, seen[0]!.totalBytes)
      ends.push(seen.at(-1)!.bytes)
    }
    t.equal(ends[0], ends[1])
  }
})

t.test('training begins with memory of its own, and ends with the same bits', async (t) => {
  for (const name of [F32, BF16, SHARDS]) {
    const results: unknown[] = []
    for (const map of [true, false]) {
      using model = await load(join(fixtures, name), { map })
      const losses = [await model.loss(tokens)] // recorded with the mapped weights
      using trainer = new Trainer(model, { learningRate: 1e-2 })
      for (let i = 0; i < 3; i++) losses.push((await trainer.step(tokens)).loss)
      t.equal(model.device.mappedBytes, 0, 'the files are let go')
      t.equal(model.weights.mapped, false)
      losses.push(await model.loss(tokens))
      t.ok(losses[4]! < losses[0]! - 0.01, 'the passes are those of the trained weights')
      results.push([losses, await everything(model)])
    }
    t.same(results[0], results[1], name)
  }
})

t.test('a weight that is written', async (t) => {
  const run = async (map: boolean): Promise<unknown[]> => {
    using model = await load(join(fixtures, F32), { map })
    const results: unknown[] = [await model.loss(tokens)]
    const weight = await model.read('model.norm.weight')
    const text = model.generate({ prompt: [1, 5, 9], maxTokens: 12, stopIds: [] })
    for (let i = 0; i < 4; i++) results.push(((await text.next()).value as { id: number }).id)
    const data = (weight.data as Float32Array).map((x, i) => (i % 2 ? -x : x))
    await model.write('model.norm.weight', { ...weight, data })
    t.equal(model.weights.mapped, false)
    for await (const { id } of text) results.push(id)
    results.push(await model.loss(tokens))
    t.not(results.at(-1), results[0])
    return [...results, ...(await everything(model))]
  }
  t.same(await run(true), await run(false), 'counts from then on, also in the middle of a text')

  using model = await load(join(fixtures, F32))
  const weight = await model.read('model.norm.weight')
  await t.rejects(model.write('model.norm.weight', { ...weight, dims: [31] }), { name: 'RangeError' })
  t.equal(model.weights.mapped, true, 'a refused write changes nothing')
})

t.test('saving over the folder that is in use', async (t) => {
  for (const name of [F32, SHARDS]) {
    const dir = copy(name)
    fs.rmSync(join(dir, 'golden.json')) // no part of a model: it would not be overwritten
    using model = await load(dir)
    const before = await everything(model)
    await model.save(dir, { overwrite: true })
    t.equal(model.weights.mapped, true)
    t.same(await everything(model), before, 'the model goes on')
    using again = await load(dir)
    t.same(await everything(again), before, 'and so does the new one')
    fs.rmSync(dir, { recursive: true })
    t.same(await everything(again), before, 'a deleted file stays until it is let go')
    await again.save(`${dir}-new`)
  }
})

t.test('two models of one file', async (t) => {
  const dir = copy(F32)
  const paths = (): number =>
    fs.readFileSync('/proc/self/maps', 'utf8').split(join(dir, 'model.safetensors')).length - 1
  const handles = (): number => fs.readdirSync('/proc/self/fd').length
  const linux = process.platform === 'linux'
  const open = linux ? handles() : 0
  const one = await load(dir)
  const two = await load(dir)
  if (linux) t.ok(paths() >= 2)
  const want = await everything(one)
  t.same(await everything(two), want)
  one.dispose()
  t.same(await everything(two), want, 'each has its own')
  const weight = await two.read('model.norm.weight')
  if (linux) t.equal(paths(), 1)
  await two.write('model.norm.weight', weight)
  if (linux) t.equal(paths(), 0, 'memory of its own: the file is let go')
  two.dispose()
  const three = await load(dir)
  three.dispose()
  if (linux) {
    t.equal(paths(), 0, 'disposing unmaps')
    t.ok(handles() <= open, `and closes: ${open} before, ${handles()} after`)
  }
})

t.test('a file that is modified in place is an error, not a wrong number', async (t) => {
  const changes: [string, (path: string) => void][] = [
    ['one byte', (path) => fs.writeSync(fs.openSync(path, 'r+'), Buffer.of(7), 0, 1, fs.statSync(path).size - 5)],
    ['rewritten, the same size', (path) => fs.writeFileSync(path, fs.readFileSync(path))],
    ['longer', (path) => fs.appendFileSync(path, 'x')],
  ]
  for (const [what, change] of changes) {
    const dir = copy(F32)
    const path = join(dir, 'model.safetensors')
    const error = {
      name: 'RopewalkError',
      code: 'ERR_FILE_CHANGED',
      message: new RegExp(`^${path} changed .*load the model again, or load it with map: false$`),
    }
    using model = await load(dir)
    using read = await load(dir, { map: false })
    await model.logits(tokens)
    const text = model.generate({ prompt: [1, 5, 9], maxTokens: 12, stopIds: [] })
    await text.next()
    change(path)
    const weight = { type: 'float32' as const, dims: [32], data: new Float32Array(32) }
    await t.rejects(model.logits(tokens), error, what)
    await t.rejects(model.gradients(tokens), error)
    await t.rejects(model.read('model.norm.weight'), error)
    await t.rejects(model.write('model.norm.weight', weight), error)
    await t.rejects(model.save(join(place, 'never')), error)
    await t.rejects(text.next(), error)
    await t.rejects(new Trainer(model).step(tokens), error)
    t.equal(model.device.allocatedBytes, 0, 'a start that failed leaves nothing behind')
    t.notOk(fs.existsSync(join(place, 'never')))
    await read.logits(tokens)
  }
})

const child = fileURLToPath(new URL('./child.ts', import.meta.url))

function inProcess(mode: string, dir: string): Promise<{ code: number | null; signal: string | null; out: string }> {
  return new Promise((resolve, reject) => {
    const running = spawn(process.execPath, [...process.execArgv, child, mode, dir], { stdio: 'pipe' })
    let out = ''
    running.stdout.on('data', (data: Buffer) => (out += data.toString()))
    running.stderr.on('data', (data: Buffer) => (out += data.toString()))
    running.once('error', reject)
    running.once('close', (code, signal) => resolve({ code, signal, out }))
  })
}

function inWorker(mode: string, dir: string): Promise<string> {
  return new Promise((resolve, reject) => {
    const worker = new Worker(child, { workerData: [mode, dir] })
    worker.once('message', (said: string[]) => resolve(said.join('\n')))
    worker.once('error', reject)
  })
}

t.test('a file that is cut while it is in use does not end the process', async (t) => {
  const check = (said: string, path: string, what: string): void => {
    const [before, ...after] = said.trim().split('\n')
    t.equal(before, 'logits before: was done', what)
    t.equal(after.length, 4)
    for (const line of after)
      t.match(line, `: RopewalkError ERR_FILE_CHANGED: ${path} changed (or was truncated)`, what)
  }
  for (const mode of ['page', 'inside', 'during']) {
    const dir = copy(F32)
    const path = join(dir, 'model.safetensors')
    const { code, signal, out } = await inProcess(mode, dir)
    t.same({ code, signal }, { code: 0, signal: null }, out)
    check(out, path, mode)
  }
  for (const mode of ['page', 'during']) {
    const dir = copy(F32)
    check(await inWorker(mode, dir), join(dir, 'model.safetensors'), `${mode}, in a worker`)
  }
  t.match(
    await inProcess('signal', copy(F32)),
    { code: null, signal: 'SIGBUS' },
    'a signal that another process sends still counts',
  )
})

t.test('a mapped buffer is only read', async (t) => {
  using device = Device.open('cpu', { threads: 1 })
  const path = join(copy(F32), 'model.safetensors')
  const fd = fs.openSync(path, 'r')
  const file = device.map(fd, path)!
  t.same([device.mappedBytes, device.allocatedBytes], [fs.statSync(path).size, 0])
  const tensor = new Tensor(file, 8, 'f32', [16])
  const recorder = new Recorder(device, 'write')
  const refused = { name: 'TypeError', message: /fill: y \(.*model\.safetensors f32 \(\d+\)\) is a file .* only read/ }
  t.throws(() => fill(recorder, { y: tensor, value: 0 }), refused)
  t.throws(() => fill(recorder, { y: tensor.rows(2, 3), value: 0 }), refused)
  t.equal(recorder.commands.length, 0)
  await t.rejects(device.upload(tensor, new Float32Array(16)), { name: 'TypeError', message: /only read/ })
  await t.rejects(device.read(tensor, fd, 0, 'F32'), { name: 'TypeError', message: /only read/ })
  t.same(await device.download(tensor), Uint8Array.from(fs.readFileSync(path).subarray(8, 72)))
  const { y } = cast(recorder, { x: tensor, y: recorder.scratch('bf16', [16], 'y') })
  await recorder.plan({ keep: [y] }).run()
  file.dispose()
  t.equal(device.mappedBytes, 0)
  await t.rejects(device.download(tensor), { message: /disposed/ })

  fs.writeFileSync(path, '')
  t.equal(device.map(fs.openSync(path, 'r'), path), undefined, 'an empty file')
  t.equal(device.map(fs.openSync('/dev/null', 'r'), '/dev/null'), undefined, 'no file')
  t.equal(device.map(1 << 30, 'nothing'), undefined, 'nothing')
  t.equal(Device.open('dry').map(fd, path), undefined, 'the dry device')
  const plain = device.tensor('f32', [4], 'plain')
  await t.rejects(device.findNotFinite(plain), { name: 'TypeError' })
  t.throws(() => native().mapFile(77, fd, path), { message: /disposed/ })
})
