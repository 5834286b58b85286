import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { didYouMean, RopewalkError } from '../errors.js'
import { containedFile, type FolderTensor, pickleNames, readConfig, realFolder } from './folder.js'
import type { JsonObject } from './json.js'
import { openSafetensors, pickleError } from './safetensors.js'

/** Adapters as PEFT saves them: adapter_config.json, adapter_model.safetensors; config.json where it came from here. */

export type AdapterFolder = {
  dir: string
  /** adapter_config.json as parsed. */
  config: JsonObject
  /** config.json of the base as it was when the adapter was trained, where the folder has it. */
  modelConfig: JsonObject | undefined
  tensors: Map<string, FolderTensor>
}

export const adapterConfigName = 'adapter_config.json'
export const adapterWeightsName = 'adapter_model.safetensors'

/** Opens an adapter's folder and checks what can be checked without reading a weight. Throws RopewalkError. */
export async function openAdapterFolder(dir: string): Promise<AdapterFolder> {
  const root = await realFolder(dir)
  const names = new Set(await readdir(root))
  for (const name of [adapterConfigName, adapterWeightsName]) {
    if (names.has(name)) continue
    const pickle = [...names].find((other) => other.startsWith('adapter_model.') && pickleNames.test(other))
    if (pickle !== undefined && name === adapterWeightsName) throw pickleError(join(dir, pickle))
    throw new RopewalkError(
      'ERR_NOT_FOUND',
      `${dir}: no ${name}${didYouMean(name, names)}: a folder with an adapter that PEFT or ropewalk saved is expected`,
    )
  }
  const config = await readConfig(dir, root, adapterConfigName)
  const modelConfig = names.has('config.json') ? await readConfig(dir, root, 'config.json') : undefined
  const path = join(dir, adapterWeightsName)
  const file = await openSafetensors(await containedFile(root, adapterWeightsName, path), path)
  await file.close()
  const tensors = new Map(Array.from(file.tensors, ([name, tensor]) => [name, { ...tensor, path: file.path }]))
  return { dir, config, modelConfig, tensors }
}
