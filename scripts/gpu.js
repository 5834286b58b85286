// `npm run gpu`: everything that only a machine with a GPU can tell, within ten minutes, into one JSON and one Markdown
// report. In a clone it makes a bundle (gpu-bundle.js) and goes on inside it; a bundle carried to another machine needs
// nothing there but Node, the driver and, for their parts, nvcc, compute-sanitizer and a Python with PyTorch.
//
//   --part a,b      only machine, doctor and these   --device name   cuda (default), cuda:1; simt rehearses, tiny sizes
//   --out folder    of the reports; default $OUT, else bench/results of the clone, else the current folder
//   --log folder    of what every command wrote; default --out, but build/gpu where that is bench/results
//   --time s        for all parts together, default 570
//
// Exit code: 0 nothing failed, 1 a part failed, 2 wrong arguments, 3 there is no GPU: every part was skipped.
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { Session } from './gpu-session.js'
import { markdown } from './gpu-report.js'
import { PARTS } from './gpu-parts.js'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const options = readOptions()
if (existsSync(join(root, 'bundle.json'))) process.exit(await runParts())
else process.exit(await runInBundle())

function readOptions() {
  const known = Object.keys(PARTS)
  const fail = (message) => {
    console.error(`gpu: ${message}`)
    process.exit(2)
  }
  let values
  try {
    const text = { type: 'string' }
    ;({ values } = parseArgs({ options: { part: text, device: text, out: text, log: text, time: text } }))
  } catch (error) {
    return fail(error.message)
  }
  const { part = known.join(), device = 'cuda', time = '570' } = values
  const parts = part.split(',')
  const unknown = parts.find((name) => !known.includes(name))
  if (unknown !== undefined) fail(`there is no part "${unknown}"; known are ${known.join(', ')}`)
  if (!/^(cuda(:\d+)?|simt)$/.test(device)) fail(`--device is "${device}", but must be cuda, cuda:1 or simt`)
  if (!(Number(time) >= 10)) fail(`--time is "${time}", but must be a number of seconds of at least 10`)
  const given = values.out || process.env.OUT
  const carried = existsSync(join(root, 'bundle.json'))
  const out = resolve(given || (carried ? '.' : join(root, 'bench', 'results')))
  const log = resolve(values.log || (given || carried ? out : join(root, 'build', 'gpu')))
  const chosen = known.filter((name) => PARTS[name].first || parts.includes(name))
  return { parts: chosen, device, seconds: Number(time), out, log }
}

async function runInBundle() {
  const folder = join(root, 'build', 'gpu')
  const { makeBundle } = await import('./gpu-bundle.js')
  const library = { cuda: 'libropewalk_cuda.so', simt: undefined }[options.device.split(':')[0]]
  if (library && !existsSync(join(root, 'build', 'Release', library))) {
    console.error(`gpu: build/Release/${library} is missing: npm run build:cuda (needs nvcc)`)
    return 1
  }
  try {
    makeBundle(folder)
  } catch (error) {
    console.error(`gpu: ${error.message}`)
    return 1
  }
  const { parts, device, seconds, out, log } = options
  const args = ['--part', parts.join(), '--device', device, '--time', String(seconds), '--out', out, '--log', log]
  return spawnSync(process.execPath, [join(folder, 'scripts', 'gpu.js'), ...args], { stdio: 'inherit' }).status ?? 1
}

async function runParts() {
  const { parts, device, seconds, out, log } = options
  const begun = new Date()
  const name = `gpu-${begun.toISOString().slice(0, 19).replaceAll(/[-:]/g, '').replace('T', '-')}`
  for (const folder of [out, log]) mkdirSync(folder, { recursive: true })
  const file = (ending) => join(out, `${name}.${ending}`)
  const session = new Session({ root, device, seconds, log: join(log, `${name}.log`) })
  const bundle = JSON.parse(readFileSync(join(root, 'bundle.json'), 'utf8'))
  const report = { version: 1, device, date: begun.toISOString(), commit: bundle.commit, bundle, parts: {} }
  const save = () => {
    writeFileSync(file('json'), `${JSON.stringify(report, null, 1)}\n`)
    writeFileSync(file('md'), markdown(report))
  }
  const run = async (part) => {
    const start = performance.now()
    let result
    if (session.left() < 3) result = { status: 'skipped', summary: `the ${seconds} s of --time were over` }
    else {
      session.say(part, 'begins')
      try {
        result = await PARTS[part].run(session, report)
      } catch (error) {
        result = { status: 'failed', summary: String(error.stack ?? error) }
      }
    }
    report.parts[part] = { ...result, seconds: Math.round((performance.now() - start) / 1000) }
    session.say(part, `${result.status} after ${report.parts[part].seconds} s: ${result.summary}`)
    save()
  }
  // What computes the same however busy the machine is runs side by side; what is timed runs alone, and after it.
  for (const part of parts.filter((part) => PARTS[part].first)) await run(part)
  const { doctor } = report.parts
  if (doctor.status !== 'passed') {
    for (const part of parts.filter((part) => !PARTS[part].first)) {
      report.parts[part] = { status: 'skipped', summary: 'without the device: see doctor', seconds: 0 }
    }
  } else {
    await Promise.all(parts.filter((part) => !PARTS[part].first && !PARTS[part].alone).map(run))
    for (const part of parts.filter((part) => PARTS[part].alone)) await run(part)
  }
  const results = Object.values(report.parts)
  const count = (status) => results.filter((result) => result.status === status).length
  report.seconds = Math.round((Date.now() - begun) / 1000)
  save()
  const why = doctor.status === 'skipped' ? ` (${doctor.summary})` : ''
  const counts = `${count('passed')} passed, ${count('failed')} failed, ${count('skipped')} skipped`
  session.say('gpu', `${counts}${why}: ${file('md')}`)
  return count('failed') > 0 ? 1 : why ? 3 : 0
}
