// What only another process can show: SIGKILL at every system call of a save, the order of its fsyncs, and an fsync that
// fails. Runs under strace on the compiled library, whose start is short; skipped where there is no strace.
import { spawn, spawnSync } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { checkpointName, findCheckpoint, verifyCheckpoint } from '../../lib/train/checkpoint.js'
import { Trainer, type TrainerOptions } from '../../lib/train/trainer.js'
import { fixtures } from '../golden.js'

const root = fileURLToPath(new URL('../..', import.meta.url))
const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-crash-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

const strace = spawnSync('strace', ['-f', '-e', 'trace=none', process.execPath, '-e', '0'], { stdio: 'ignore' })
if (strace.status !== 0) {
  t.skip('needs strace, and the right to use it')
  process.exit()
}

// The library compiled into a package of its own, beside links to what it needs of this one.
const tsc = [join(root, 'node_modules/typescript/bin/tsc'), '-p', root, '--noCheck', '--declaration', 'false']
const compiled = spawnSync(process.execPath, [...tsc, '--outDir', join(dir, 'dist')], { encoding: 'utf8' })
if (compiled.status !== 0) throw new Error(compiled.stdout)
for (const name of ['build', 'prebuilds', 'node_modules']) fs.symlinkSync(join(root, name), join(dir, name))
fs.copyFileSync(join(root, 'package.json'), join(dir, 'package.json'))

const model = join(fixtures, 'gqa-linear4-f32')
const data = join(dir, 'data.txt')
fs.writeFileSync(data, 'the rope was laid along the walk and every strand of it was stretched until it held')
const base: TrainerOptions = { data, context: 16, learningRate: 1e-3, cacheDir: join(dir, 'cache'), saveEvery: 1 }

async function train(output: string, options: TrainerOptions): Promise<void> {
  using loaded = await Llama.load(model, { device: 'cpu' })
  using trainer = new Trainer(loaded, { ...base, output, ...options })
  for await (const _ of trainer.run());
}
const sums = (output: string, step: number): string =>
  fs.readFileSync(join(output, checkpointName(step), 'checksums.json'), 'utf8')

/** Resumes `output` at step 2 and goes on to step 3 in a process under strace; gives its log and what it said. */
function child(output: string, ...args: string[]): Promise<{ signal: string | null; log: string; stderr: string }> {
  const options = JSON.stringify({ ...base, output, steps: 3, resume: true })
  // marks in the log: what lies between them is the save
  const code = `
    import fs from 'node:fs'
    import { Llama } from ${JSON.stringify(join(dir, 'dist/model/llama.js'))}
    import { Trainer } from ${JSON.stringify(join(dir, 'dist/train/trainer.js'))}
    const model = await Llama.load(${JSON.stringify(model)}, { device: 'cpu', threads: 1 })
    const trainer = new Trainer(model, ${options})
    for await (const _ of trainer.run());`
  const log = join(output, '..', 'strace.log')
  return new Promise((resolve) => {
    const trace = ['-f', '-qq', '-y', '-o', log, ...args]
    const run = spawn('strace', [...trace, process.execPath, '--input-type=module', '-e', code], {
      stdio: ['ignore', 'ignore', 'pipe'],
    })
    let stderr = ''
    run.stderr.on('data', (chunk) => (stderr += chunk))
    run.on('exit', (_, signal) => resolve({ signal, log: fs.readFileSync(log, 'utf8'), stderr }))
  })
}

let serial = 0
let prepared: string
/** A fresh copy of a run that stands at step 2. */
function stand(): string {
  const output = join(dir, `case-${serial++}`, 'output')
  fs.cpSync(prepared, output, { recursive: true })
  return output
}

t.before(async () => {
  prepared = join(dir, 'prepared')
  await train(prepared, { steps: 2 })
  const straight = join(dir, 'straight')
  await train(straight, { steps: 3 })
})

/** Calls that change what is on the disk. */
const CALLS = ['mkdir', 'fsync', 'rename', 'unlink', 'rmdir', 'write', 'openat']

t.test('files, folder, rename, folder: in this order', async (t) => {
  const output = stand()
  const { log, signal } = await child(output, '-e', 'trace=fsync,rename')
  t.equal(signal, null)
  const events = log.split('\n').flatMap((line) => {
    const synced = /fsync\(\d+<(.*?)>/.exec(line)?.[1]
    const renamed = /rename\("(.*?)", "(.*?)"/.exec(line)
    if (renamed) return [`${renamed[1]!.replace(/.*\//, '')} -> ${renamed[2]!.replace(/.*\//, '')}`]
    return synced === undefined ? [] : [synced.slice(output.length + 1)]
  })
  const plain = events.map((event) => event.replace(/tmp-\d+-\w+/g, 'tmp').replace(/old-\d+-\w+/g, 'old'))
  const name = checkpointName(3)
  const committed = plain.indexOf(`${name}.tmp -> ${name}`)
  t.ok(committed > 0)
  const inside = fs.readdirSync(join(output, name))
  for (const file of inside) {
    const place = plain.findIndex((event) => event.startsWith(`${name}.tmp`) && event.endsWith(`/${file}`))
    t.ok(place >= 0 && place < committed, `${file} is on the disk before the folder has its name`)
  }
  const folder = plain.lastIndexOf(`${name}.tmp`, committed)
  t.ok(folder > plain.findIndex((event) => event.endsWith('/checksums.json')), 'and so are their names')
  t.equal(plain[committed + 1], '', 'then the name of the folder')
  const deleted = plain.indexOf(`${checkpointName(1)} -> ${checkpointName(1)}.old`)
  t.ok(deleted > committed + 1, 'an old one goes last')
})

t.test('an fsync that fails ends the run and is not tried again', async (t) => {
  for (const when of [2, 5]) {
    const output = stand()
    const { log, stderr } = await child(output, '-e', 'trace=fsync', '-e', `inject=fsync:error=EIO:when=${when}`)
    const failed = log.split('\n').filter((line) => line.includes('EIO'))
    t.equal(failed.length, 1)
    const path = /<(.*?)>/.exec(failed[0]!)![1]!
    t.equal(log.split(path + '>').length, 2, `${path}: once`)
    t.match(stderr, /ERR_WRITE/)
    t.equal((await findCheckpoint(output, t.fail))!.record.step, 2, 'the old ones are whole')
    t.equal((await verifyCheckpoint(join(output, checkpointName(1)))).step, 1)
    t.notOk(fs.readdirSync(output).some((name) => name.includes('.tmp-')), 'nothing half-written stays')
  }
})

t.test('SIGKILL at every system call of a save', async (t) => {
  // Where the save begins and ends, in calls of each kind.
  const first = stand()
  const { log } = await child(first, '-e', `trace=${CALLS.join()}`)
  const counts: Record<string, number> = {}
  const cases: { call: string; when: number }[] = []
  let saving = false
  for (const line of log.split('\n')) {
    const call = /^\d+\s+(\w+)\(/.exec(line)?.[1]
    if (!call || !CALLS.includes(call)) continue
    counts[call] = (counts[call] ?? 0) + 1
    // only what names the run's folder, but all of what the save does there
    saving ||= line.includes(`${checkpointName(3)}.tmp`)
    if (saving && line.includes(first)) cases.push({ call, when: counts[call] })
  }
  t.ok(cases.length > 20, `${cases.length} calls`)
  const every = Number(process.env.ROPEWALK_CRASH_EVERY ?? 4)
  const chosen = cases.filter((_, i) => i % every === 0)
  const stood = { old: 0, new: 0 }
  const want = sums(join(dir, 'straight'), 3)
  for (const { call, when } of chosen) {
    const output = stand()
    await child(output, '-e', `trace=${CALLS.join()}`, '-e', `inject=${call}:signal=KILL:when=${when}`)
    const found = await findCheckpoint(output, (message) => t.fail(`${call} ${when}: ${message}`))
    if (found!.record.step === 3) stood.new++
    else stood.old++
    await train(output, { steps: 3, resume: true })
    if (sums(output, 3) !== want) t.fail(`${call} ${when}: other bits`)
    const names = fs.readdirSync(output).filter((name) => name.includes('.tmp-') || name.includes('.old-'))
    if (found!.record.step < 3 && names.length > 0) t.fail(`${call} ${when}: ${names} left over`)
    fs.rmSync(join(output, '..'), { recursive: true })
  }
  t.ok(stood.old > 0 && stood.new > 0, `${chosen.length} of ${cases.length} calls: ${JSON.stringify(stood)}`)
})
