// What a crash, a power cut or a failing disk can do to a save. Every call that changes the disk goes through hooks here,
// so that each of them in turn can be the last one, or fail. (Real SIGKILLs and a really full disk: checkpoint.test.ts.)
import * as fs from 'node:fs'
import fsp, { type FileHandle } from 'node:fs/promises'
import { syncBuiltinESMExports } from 'node:module'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import t, { type Test } from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { checkpointName, findCheckpoint } from '../../lib/train/checkpoint.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'

// Nothing here asks what the real disk does: memory is quicker.
const dir = fs.mkdtempSync(join(fs.existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'ropewalk-crash-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

/**
 * The calls of one save, counted. At call `at`, counted from 1, the machine stops (that call is half done, no other
 * happens) or the call fails with `code`. It knows what no fsync has covered yet, and can take that away.
 */
class Disk {
  readonly calls: string[] = []
  /** Calls of `sync` that failed, and those on the same file after that. */
  readonly failedSyncs: string[] = []
  syncsAfterFailure = 0
  private stopped = false
  private readonly dirty = new Set<string>()
  private undo: { dir: string; back: () => void }[] = []
  private readonly real = { ...fsp }
  private graves = 0

  constructor(
    private readonly at: number,
    private readonly code?: string,
  ) {}

  install(): void {
    Object.assign(fsp, {
      open: async (path: string, flags = 'r', ...rest: unknown[]) => {
        if (flags !== 'r' && typeof flags === 'string') this.call('open', path)
        const fresh = !fs.existsSync(path)
        const handle = await this.real.open(path, flags, ...(rest as []))
        if (flags !== 'r' && fresh) this.changed(path, () => fs.rmSync(path, { force: true }))
        return this.watch(handle, path)
      },
      mkdir: async (path: string, options?: fs.MakeDirectoryOptions) => {
        if (!fs.existsSync(path)) {
          this.call('mkdir', path)
          this.changed(path, () => fs.rmSync(path, { recursive: true, force: true }))
        }
        return this.real.mkdir(path, options)
      },
      rename: async (from: string, to: string) => {
        this.call('rename', `${from} -> ${to}`)
        await this.real.rename(from, to)
        for (const path of [...this.dirty]) {
          if (!path.startsWith(`${from}/`)) continue
          this.dirty.delete(path)
          this.dirty.add(to + path.slice(from.length))
        }
        for (const change of this.undo) if (change.dir === from) change.dir = to
        this.changed(to, () => fs.renameSync(to, from))
      },
      rm: async (path: string, options?: fs.RmOptions) => {
        if (!fs.existsSync(path)) return
        this.call('rm', path, () => {
          const [inside] = fs.statSync(path).isDirectory() ? fs.readdirSync(path) : []
          if (inside !== undefined) fs.rmSync(join(path, inside), { recursive: true })
        })
        const grave = join(dir, `grave-${this.graves++}`)
        fs.rmSync(grave, { recursive: true, ...options, force: true })
        fs.renameSync(path, grave)
        this.changed(path, () => fs.renameSync(grave, path))
      },
    })
    syncBuiltinESMExports()
  }

  remove(): void {
    Object.assign(fsp, this.real)
    syncBuiltinESMExports()
  }

  /** Takes away what was never fsynced: contents by `spoil`, names (the newest first) where `loses` says so. */
  cutPower(spoil: (path: string) => void, loses: () => boolean): void {
    for (const path of this.dirty) if (fs.existsSync(path)) spoil(path)
    for (const { back } of this.undo.reverse()) {
      if (!loses()) break // names of one file system are lost from the end
      back()
    }
  }

  private call(name: string, path: string, half?: () => void): void {
    if (this.stopped) throw new Error('the machine has stopped')
    this.calls.push(`${name} ${path}`)
    if (this.calls.length !== this.at) return
    if (this.code !== undefined) throw Object.assign(new Error(`${this.code}: injected, ${name}`), { code: this.code })
    this.stopped = true
    half?.()
    throw new Error('the machine has stopped')
  }

  private changed(path: string, back: () => void): void {
    this.undo.push({ dir: dirname(path), back })
  }

  private watch(handle: FileHandle, path: string): FileHandle {
    const { write, sync } = { write: handle.write.bind(handle), sync: handle.sync.bind(handle) }
    handle.write = (async (bytes: Uint8Array, offset = 0, length = bytes.byteLength - offset) => {
      this.call('write', path, () => fs.appendFileSync(path, bytes.subarray(offset, offset + (length >> 1))))
      this.dirty.add(path)
      return write(bytes, offset, length)
    }) as never
    handle.sync = async () => {
      if (this.failedSyncs.includes(path)) this.syncsAfterFailure++
      try {
        this.call('sync', path)
      } catch (error) {
        this.failedSyncs.push(path)
        throw error
      }
      await sync()
      this.dirty.delete(path)
      this.undo = this.undo.filter((change) => change.dir !== path)
    }
    return handle
  }
}

const tokens = [Array.from({ length: 16 }, (_, i) => (i * 37 + 11) % 300)]
const options: TrainerOptions = { learningRate: 1e-3 }
const folder = join(fixtures, 'gqa-linear4-f32')
const prepared = join(dir, 'prepared')
const sums = (output: string, step: number): string =>
  fs.readFileSync(join(output, checkpointName(step), 'checksums.json'), 'utf8')
/** One for all cases: each takes up a checkpoint, and with it every bit. */
let model: Llama
/** checksums.json of the third checkpoint of a run in which nothing went wrong. */
let want: string
let serial = 0

t.before(async () => {
  model = await Llama.load(folder, { device: 'cpu', threads: 1 })
  using trainer = new Trainer(model, { ...options, output: prepared })
  for (let step = 0; step < 2; step++) {
    await trainer.step(tokens)
    await trainer.save()
  }
  const straight = join(dir, 'straight')
  fs.cpSync(prepared, straight, { recursive: true })
  await attempt(straight, new Disk(Infinity))
  want = sums(straight, 3)
})

/** Takes up the run in `output` at its newest checkpoint, goes on to step 3 and saves, on a disk. */
async function attempt(
  output: string,
  disk: Disk,
  then?: (trainer: Trainer) => Promise<void>,
): Promise<Error | undefined> {
  using trainer = new Trainer(model, { ...options, output, resume: true })
  await trainer.save() // nothing new: only takes up the checkpoint
  while (trainer.state.step < 3) await trainer.step(tokens)
  disk.install()
  try {
    await trainer.save()
    // an old checkpoint that cannot be deleted is told, and no reason to stop
    return trainer.warnings[0] === undefined
      ? undefined
      : Object.assign(new Error(trainer.warnings[0]), { code: 'warning' })
  } catch (error) {
    disk.remove()
    await then?.(trainer)
    return error as Error
  } finally {
    disk.remove()
  }
}

function stand(): string {
  const output = join(dir, `case-${serial++}`)
  fs.cpSync(prepared, output, { recursive: true })
  return output
}

/** What must hold after anything: a healthy checkpoint, and from it the same bits. */
async function holds(t: Test, output: string, what: string): Promise<number> {
  const found = await findCheckpoint(output, () => undefined).catch(() => undefined)
  const step = found?.record.step ?? 0
  if (step < 2) t.fail(`${what}: only step ${step} is left`)
  await attempt(output, new Disk(Infinity))
  if (sums(output, 3) !== want) t.fail(`${what}: other bits`)
  const left = fs.readdirSync(output).filter((name) => /\.(tmp|old)-/.test(name))
  if (left.length > 0) t.fail(`${what}: left over ${left}`)
  fs.rmSync(output, { recursive: true })
  return step
}

async function callsOfSave(): Promise<string[]> {
  const disk = new Disk(Infinity)
  const output = stand()
  await attempt(output, disk)
  return disk.calls.map((call) =>
    call
      .replaceAll(`${output}/`, '')
      .replaceAll(output, '')
      .replace(/-\d+-[0-9a-f]{8}/g, ''),
  )
}

t.test('every file, their folder, its name, then the deletion', async (t) => {
  const calls = await callsOfSave()
  const name = checkpointName(3)
  const at = (call: string): number => calls.indexOf(call)
  const commit = at(`rename ${name}.tmp -> ${name}`)
  t.ok(commit > 0)
  for (const file of [
    'config.json',
    'model.safetensors',
    'tokenizer.json',
    'trainer.json',
    'trainer.safetensors',
    'checksums.json',
  ]) {
    const synced = calls.findIndex((call) => call.startsWith(`sync ${name}.tmp`) && call.endsWith(`/${file}`))
    t.ok(synced > 0 && synced < commit, file)
  }
  t.ok(calls.lastIndexOf(`sync ${name}.tmp`, commit) > at(`sync ${name}.tmp/checksums.json`))
  t.equal(calls[commit + 1], 'sync ')
  t.ok(at(`rename ${checkpointName(1)} -> ${checkpointName(1)}.old`) > commit + 1)
})

t.test('the machine stops at every call', async (t) => {
  const count = (await callsOfSave()).length
  const stood = new Map<number, number>()
  for (let at = 1; at <= count; at++) {
    const output = stand()
    const disk = new Disk(at)
    if (!(await attempt(output, disk))) t.fail(`call ${at} did not stop it`)
    const step = await holds(t, output, disk.calls.at(-1)!)
    stood.set(step, (stood.get(step) ?? 0) + 1)
  }
  t.ok(stood.get(2)! > 10 && stood.get(3)! > 0, `${count} calls: stood at step 2 or 3 ${[...stood]}`)
})

t.test('the power fails at every call', async (t) => {
  const count = (await callsOfSave()).length
  let seed = 7
  const random = (n: number): number => (seed = (seed * 48271) % 2147483647) % n
  const spoils: ((path: string) => void)[] = [
    (path) => fs.truncateSync(path, 0),
    (path) => fs.truncateSync(path, random(fs.statSync(path).size + 1)),
    (path) => fs.writeFileSync(path, Buffer.alloc(fs.statSync(path).size)),
  ]
  let cases = 0
  for (let at = 1; at <= count + 1; at++) {
    for (const loses of [() => true, () => random(3) > 0]) {
      const output = stand()
      const disk = new Disk(at)
      const stopped = await attempt(output, disk)
      disk.cutPower(spoils[random(3)]!, loses)
      const step = await holds(t, output, `${disk.calls.at(-1)}, then the power`)
      if (!stopped) t.equal(step, 3, 'a save that has returned is never lost')
      cases++
    }
  }
  t.pass(`${cases} cases`)
})

t.test('every call fails', async (t) => {
  const count = (await callsOfSave()).length
  for (const [code, every] of [
    ['EIO', 1],
    ['ENOSPC', 3],
    ['EDQUOT', 7],
  ] as const) {
    for (let at = 1; at <= count; at += every) {
      const output = stand()
      const disk = new Disk(at, code)
      let went: boolean | undefined
      const error = await attempt(output, disk, async (trainer) => {
        // The run itself is unharmed: with a disk that works the same checkpoint is written.
        went = await trainer.save().then(
          () => sums(output, 3) === want,
          () => false,
        )
      })
      const what = `${code} at ${disk.calls[at - 1]}`
      if (!error || went === false) t.fail(`${what}: ${error ? 'the run was harmed' : 'not reported'}`)
      else if (!error.message.includes(output) || !(error as { code?: string }).code)
        t.fail(`${what}: ${error.message}`)
      if (disk.syncsAfterFailure > 0) t.fail(`${what}: an fsync that failed was tried again`)
      await holds(t, output, what)
    }
  }
  t.pass(`${count} calls`)
})
