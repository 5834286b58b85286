import { availableParallelism, release, totalmem } from 'node:os'
import { formatBytes } from '../errors.js'
import { Device, version } from '../index.js'
import { addonPath, native } from '../runtime/native.js'
import { matmulNt } from '../runtime/ops.gen.js'
import { Recorder } from '../runtime/recorder.js'
import { type Command, commonOptions } from './options.js'

const options = { ...commonOptions }

interface Check {
  name: string
  /** false: ropewalk cannot work. */
  ok: boolean
  /** Something optional is not there. */
  absent?: boolean
  detail: string
}

/** The oldest Node that package.json's engines allow. */
const OLDEST_NODE = [20, 19] as const

export const doctor: Command<typeof options> = {
  name: 'doctor',
  summary: 'Checks this machine: Node, libc, native addon, backends, and a kernel against a reference.',
  examples: ['ropewalk doctor', 'ropewalk doctor --json'],
  operands: [],
  options,
  async run(_, output) {
    const checks: Check[] = [node(), platform(), addon(), ...backends()]
    if (checks.every(({ ok }) => ok)) checks.push(await selfCheck())
    const broken = checks.find(({ ok }) => !ok)
    const verdict = broken
      ? `not ready: ${broken.name}. ${nextStep(broken)}`
      : 'ready. Next: ropewalk inspect <model folder>, then ropewalk extend <model folder> --context 8192 --help'
    const width = Math.max(...checks.map(({ name }) => name.length))
    for (const { name, ok, absent, detail } of checks) {
      output.line(`${absent ? '-- ' : ok ? 'ok ' : 'BAD'} ${name.padEnd(width)}  ${detail}`)
    }
    output.line(verdict)
    output.value({ ok: !broken, version, checks, verdict })
    return broken ? 1 : 0
  },
}

function node(): Check {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  const [wantedMajor, wantedMinor] = OLDEST_NODE
  const ok = major > wantedMajor || (major === wantedMajor && minor >= wantedMinor)
  const needed = ok ? '' : `, but Node >= ${OLDEST_NODE.join('.')} is needed`
  return { name: 'node', ok, detail: `${process.versions.node}${needed}; ropewalk ${version}` }
}

function platform(): Check {
  const report = process.report?.getReport() as { header?: { glibcVersionRuntime?: string } } | undefined
  const glibc = report?.header?.glibcVersionRuntime
  const libc = process.platform !== 'linux' ? '' : glibc ? `, glibc ${glibc}` : ', not glibc (musl?)'
  const machine = `${availableParallelism()} cores, ${short(totalmem())} of memory`
  return { name: 'platform', ok: true, detail: `${process.platform}-${process.arch} ${release()}${libc}; ${machine}` }
}

/** 1.5 GiB, without the exact number. */
const short = (bytes: number): string => formatBytes(bytes).replace(/.*\((.*)\)/, '$1')

function addon(): Check {
  try {
    native()
    return { name: 'addon', ok: true, detail: addonPath() }
  } catch (error) {
    return { name: 'addon', ok: false, detail: (error as Error).message }
  }
}

/** One line a backend, and a further one for each further GPU; only the CPU's absence is a fault. */
function backends(): Check[] {
  let list: ReturnType<ReturnType<typeof native>['backends']>
  try {
    list = native().backends()
  } catch {
    return []
  }
  return list
    .filter(({ name, available }) => available || name !== 'simt')
    .map(({ name, available, detail, memory }) => ({
      name,
      ok: available || name !== 'cpu',
      absent: !available && name !== 'cpu',
      detail: memory ? `${detail}, ${short(memory.freeBytes)} free` : detail,
    }))
}

/** A matrix product of odd shape on the device that `auto` is, against float64. */
async function selfCheck(): Promise<Check> {
  const name = 'self-check'
  const [m, n, k] = [37, 53, 29]
  const wave = (count: number, step: number): Float32Array =>
    Float32Array.from({ length: count }, (_, i) => Math.sin(i * step))
  const left = wave(m * k, 0.7)
  const right = wave(n * k, 1.3)
  try {
    using device = Device.open()
    const a = device.tensor('f32', [m, k], 'a')
    const b = device.tensor('f32', [n, k], 'b')
    const recorder = new Recorder(device, 'self-check')
    const { c } = matmulNt(recorder, { a, b })
    const plan = recorder.plan({ keep: [c] })
    await Promise.all([device.upload(a, left), device.upload(b, right), plan.run()])
    const product = await device.downloadFloats(plan.located(c))
    plan.dispose()
    let worst = 0
    for (let i = 0; i < m; i++) {
      for (let j = 0; j < n; j++) {
        let sum = 0
        for (let x = 0; x < k; x++) sum += left[i * k + x]! * right[j * k + x]!
        // Not Math.max: it must notice NaN.
        const error = Math.abs(product[i * n + j]! - sum)
        if (!(error <= worst)) worst = error
      }
    }
    // k products of values up to 1, each rounded to float32.
    const ok = worst <= k * 2 ** -23
    const detail = `matmul ${m}x${n}x${k} on ${device.name}: largest error ${worst.toExponential(1)}`
    return { name, ok, detail: ok ? detail : `${detail}: this machine or this build computes wrongly` }
  } catch (error) {
    return { name, ok: false, detail: (error as Error).message }
  }
}

function nextStep({ name }: Check): string {
  if (name === 'node') return `Next: install Node >= ${OLDEST_NODE.join('.')}`
  if (name === 'addon') return 'Next: npx ropewalk build (needs CMake >= 3.18 and a C++17 compiler)'
  return 'Next: rebuild with npx ropewalk build, and report it with the output of ropewalk doctor --json'
}
